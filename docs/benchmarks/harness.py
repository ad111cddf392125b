"""What the harness itself adds to a call: a sleep, and a kernel, that know how long they took.

python docs/benchmarks/harness.py docs/benchmarks/harness-<device>.json [--rounds 15]

`diffusers-turbo bench` times a pipeline whose call does nothing but sleep for a while, or multiply matrices on the GPU.
The sleep reads the clock itself; the kernel lies between two CUDA events. What the harness says beyond is its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline

from diffusers_turbo.bench import running
from diffusers_turbo.bench.cases import Case
from diffusers_turbo.bench.environment import read_environment
from diffusers_turbo.bench.job import Job
from diffusers_turbo.bench.session import run

EMOJI = Path(__file__).parents[2] / "examples" / "emoji_sd"
SLEEP_S = 0.2
PRODUCTS = 60


class Known(StableDiffusionPipeline):
    """A pipeline whose call takes a known time, and keeps it in `took`."""

    took: list[float]
    work: Any

    def __call__(self, prompt: Any = None, height: int = 64, width: int = 64, **_: Any) -> None:
        """Work, and note how long it took."""
        self.took.append(self.work())


def sleep() -> float:
    """Sleep; return how long it really was, in seconds."""
    start = time.perf_counter()
    time.sleep(SLEEP_S)
    return time.perf_counter() - start


class Multiply:
    """Products of matrices on the GPU, timed by the GPU."""

    def __init__(self) -> None:
        """Make the matrix."""
        self.matrix = torch.randn(8192, 8192, device="cuda", dtype=torch.float16)

    def __call__(self) -> float:
        """Multiply; return the seconds between the first and the last product."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(PRODUCTS):
            self.matrix @ self.matrix
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000


def overhead(work: Any, device: str, rounds: int) -> dict[str, Any]:
    """Time a pipeline that does this work through the whole harness."""
    pipe: Any = Known.from_pretrained(EMOJI)
    pipe.took, pipe.work = [], work
    load, running.load_for = running.load_for, lambda job, case: pipe
    job = Job(model=str(EMOJI), cases=(Case(name="known"),), device=device, steps=1, rounds=rounds, pairs=0)
    try:
        with tempfile.TemporaryDirectory() as folder:
            (row,) = run(job, Path(folder, "results.json"), rates=False).rows
    finally:
        running.load_for = load
    known = pipe.took[1 : 1 + rounds]  # the first is the warm-up; a profile may follow
    added = [said / took - 1 for said, took in zip(row.seconds, known, strict=True)]
    return {"known_s": known, "said_s": row.seconds, "added_median": statistics.median(added), "added_most": max(added)}


def main() -> None:
    """Measure what this machine can, print it and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    cuda = torch.cuda.is_available()
    found = {"sleep": overhead(sleep, "cuda" if cuda else "cpu", given.rounds)}
    if cuda:
        found["kernel"] = overhead(Multiply(), "cuda", given.rounds)
    environment = read_environment("cuda" if cuda else "cpu", measure=False)
    given.results.write_text(json.dumps({"environment": environment, **found}, indent=1) + "\n")
    for name, row in found.items():
        print(f"{name}: {row['added_median']:+.3%} at the median, {row['added_most']:+.3%} at most")


if __name__ == "__main__":
    main()
