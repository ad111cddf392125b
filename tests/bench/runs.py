"""What tests of whole runs share: cases, jobs, and records of what was called."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from diffusers_turbo.bench.cases import Case, Switch
from diffusers_turbo.bench.job import Job
from diffusers_turbo.bench.results import Results
from diffusers_turbo.bench.session import run

STOCK = Case(name="stock")
SDPA = Case(name="sdpa", switches=(Switch(action="enable_sdpa"),))
CHANNELS_LAST = Case(name="channels-last", switches=(Switch(action="enable_channels_last"),))
TILED = Case(name="tiled", switches=(Switch(action="enable_vae_tiling", options={"tile_size": 96}),))


def make_job(model: str, *cases: Case, **changes: Any) -> Job:
    return Job(**{"model": model, "cases": cases or (STOCK,), "steps": 1, "rounds": 3, "pairs": 0, **changes})


def measure(job: Job, folder: Path, **options: Any) -> Results:
    return run(job, folder / "results.json", rates=False, **options)


def files_in(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@dataclass
class Log:
    """What the run called, in order; `fail_at` raises instead of the call of that number, counted from 0."""

    calls: list[tuple[Any, ...]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    fail_at: int | None = None
    error: BaseException = field(default_factory=KeyboardInterrupt)

    def add(self, *call: Any) -> None:
        self.calls.append(call)
        if self.fail_at == len(self.calls) - 1:
            self.fail_at = None
            raise self.error


@dataclass
class Calls:
    """Every call of a Stable Diffusion pipeline: its arguments, whether under autocast, what it returned."""

    arguments: list[dict[str, Any]] = field(default_factory=list)
    autocast: list[bool] = field(default_factory=list)
    schedulers: list[str] = field(default_factory=list)
    images: list[torch.Tensor] = field(default_factory=list)
