"""Small cards simulated on a large GPU: our plan for a budget against the fastest hand-made way that fits it.

python docs/benchmarks/simulated_cards.py docs/benchmarks/simulated-cards-<gpu>.json [--seconds 500] [--jobs sd15-512]

First every hand-made combination of diffusers' own methods runs once a job, uncapped, for its peak and its time. Then,
for each budget, the fastest of them that fits and `auto_optimize(pipe, vram_budget=...)` each run under a cap on
PyTorch's allocator, set before anything is allocated. So do mmgp and diffusers-mm, where they are installed, at every
budget: how much they take depends on how much there is. A card also has to hold the CUDA context, so its measured size
comes off the budget. `--caps` asks instead how low a cap may be, with nothing taken off it.

Each way runs in a process of its own. It is forked from this one, which has imported everything, holds the job's
weights in host memory and leaves the GPU alone. What the file holds already is not run again; `--tiny` tries the script
on a CPU, without caps.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from simulated_cards_apart import apart, as_card, required  # first: it hides the GPU from what is imported after it
from simulated_cards_tables import GB, OURS, Row, budget_table, cap_table, has_pictures, rival_table
from simulated_cards_ways import HAND_MADE, OFFLOADERS, RIVALS, THRIFTIEST, use_offloader

# isort: split
import diffusers
import torch
import transformers

from diffusers_turbo import auto_optimize, turbo
from diffusers_turbo.actions.out_of_memory import ran_out_of_memory
from diffusers_turbo.bench.architectures import build
from diffusers_turbo.bench.environment import read_environment
from diffusers_turbo.bench.schedulers import set_scheduler
from diffusers_turbo.errors import in_one_line

BUDGETS_GB = (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24)
PROMPT = "a photograph of an astronaut riding a horse"
WARM_UP_STEPS = 3
LONG_S = 8.0
"""A picture that takes longer is timed once only."""

SHARED = "/dev/shm" if os.path.isdir("/dev/shm") else None


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is drawn, by which model, and the caps in GiB that are tried with tiles and without."""

    model: str
    side: int
    scheduler: str
    steps: int
    tiled_cap: float | None = None
    exact_caps: tuple[float, ...] = ()


JOBS = {
    "sd15-512": Job(
        model="sd15", side=512, scheduler="ddim", steps=50, tiled_cap=0.45, exact_caps=(0.45, 0.35, 0.3, 0.26)
    ),
    "sd15-1024": Job(model="sd15", side=1024, scheduler="ddim", steps=50),
    "sdxl-1024": Job(
        model="sdxl", side=1024, scheduler="euler", steps=30, tiled_cap=0.75, exact_caps=(0.75, 0.6, 0.5, 0.46)
    ),
}
TINY = {
    "emoji": Job(model="examples/emoji_sd", side=64, scheduler="ddim", steps=2, tiled_cap=0.1, exact_caps=(0.2, 0.1))
}


@dataclass(frozen=True, kw_only=True)
class Way:
    """How a job is done: by hand or by ours, under which cap in bytes, and how many pictures are timed."""

    name: str
    cap: int | None = None
    rounds: int = 1
    exact: bool = False
    fixed: bool = False


def read_machine() -> Row:
    """Return what the results say of the machine, and the bytes that a CUDA context takes."""
    cuda = torch.cuda.is_available()
    free, total = torch.cuda.mem_get_info() if cuda else (0, 0)
    return {
        "environment": read_environment("cuda" if cuda else "cpu", measure=False),
        "context_bytes": total - free,
    }


@functools.lru_cache(maxsize=1)
def load(model: str) -> Any:
    """Load a model into host memory: a folder of the repository, or an architecture made on the GPU elsewhere."""
    if (ROOT / model).exists():
        return _from_folder(ROOT / model, None)

    def save() -> Row:
        build(model, dtype=torch.float16, device="cuda").save_pretrained(folder)
        return {}

    with tempfile.TemporaryDirectory(dir=SHARED) as folder:
        required(save)
        return _from_folder(Path(folder), torch.float16)


def _from_folder(folder: Path, dtype: torch.dtype | None) -> Any:
    pipe: Any = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def measure(pipe: Any, job: Job, way: Way) -> Row:
    """Do a job in one way in this process, its first to use the GPU; running out of memory is a result, too."""
    cuda = torch.cuda.is_available()
    row: Row = {"cap_bytes": way.cap}
    answers: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if cuda and way.cap:
        torch.cuda.set_per_process_memory_fraction(way.cap / torch.cuda.mem_get_info()[1])
        if way.name in OFFLOADERS:
            row["seen_bytes"] = way.cap
            answers = as_card(way.cap)
    try:
        with answers:
            draw(pipe, job, way, row)
    except Exception as error:
        row["out_of_memory" if ran_out_of_memory(error) else "failed"] = in_one_line(error, 300)
    if cuda:
        peak = torch.cuda.max_memory_allocated()
        row |= {"peak_allocated_bytes": peak, "peak_reserved_bytes": torch.cuda.max_memory_reserved()}
        row["whole_peak_bytes"] = max(peak, row.get("whole_peak_bytes", 0))
    return row


def draw(pipe: Any, job: Job, way: Way, row: Row) -> None:
    """Set a way up, warm it up, and time its pictures."""

    def picture(steps: int) -> float:
        start = time.perf_counter()
        made = pipe(PROMPT, height=job.side, width=job.side, num_inference_steps=steps, output_type="pt").images.cpu()
        row["finite"] = bool(made.isfinite().all())
        return time.perf_counter() - start

    start = time.perf_counter()
    set_scheduler(pipe, job.scheduler)
    set_up(pipe, job, way, row)
    picture(WARM_UP_STEPS)
    row["setup_and_first_s"] = time.perf_counter() - start
    picture(WARM_UP_STEPS)
    if torch.cuda.is_available():
        row["whole_peak_bytes"] = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    seconds = [picture(job.steps)]
    if seconds[0] <= LONG_S:
        seconds += [picture(job.steps) for _ in range(way.rounds - 1)]
    row |= {"seconds": seconds, "median_s": statistics.median(seconds)}
    if way.name == OURS:
        report = pipe.turbo_report()
        notes = [note for lever in report.levers for note in lever.notes]
        row |= {
            "exact": report.exact,
            "fallbacks": [note for note in notes if note.startswith("out of memory in")],
            "uncaptured": [note for note in notes if "could not be captured" in note],
        }


def set_up(pipe: Any, job: Job, way: Way, row: Row) -> None:
    """Switch on what makes a way. Diffusers' own need a GPU and change nothing without; other packages refuse."""
    if way.name == OURS:
        side, steps = job.side, job.steps
        auto_optimize(pipe, height=side, width=side, steps=steps, vram_budget=way.cap, exact=way.exact)
        plan = pipe.turbo_report().plan
        row |= {
            "steps": {step.action: dict(step.options) for step in plan.steps},
            "predicted_bytes": plan.after.peak_bytes if plan.after else None,
            "unrestricted": bool(plan.alternatives and plan.alternatives[0].fits),
        }
    elif way.name in OFFLOADERS:
        row |= use_offloader(pipe, way.name, way.cap)
    elif torch.cuda.is_available():
        RIVALS[way.name](turbo(pipe) if way.fixed else pipe)


class Session:
    """The results, what was asked for, and how long there is."""

    def __init__(self, given: argparse.Namespace) -> None:
        """Read what is there already."""
        self.given = given
        self.until: float = time.monotonic() + given.seconds
        self.jobs = TINY if given.tiny else JOBS
        self.data: dict[str, Any] = {"rivals": {}, "cells": {}, "caps": {}}
        if given.results.exists():
            self.data |= json.loads(given.results.read_text())

    @property
    def late(self) -> bool:
        """Whether nothing more is to be started."""
        return time.monotonic() > self.until

    def keep(self, rows: Row, name: str, row: Row) -> None:
        """Put a row where it belongs, and all into the file."""
        rows[name] = row
        self.given.results.write_text(json.dumps(self.data, indent=1) + "\n")

    def run(self, name: str, way: Way) -> Row:
        """Do a job in one way, and print what came of it."""
        job, start = self.jobs[name], time.monotonic()
        pipe = load(job.model)
        row = apart(lambda: measure(pipe, job, way), self.given.limit)
        if "forked subprocess" in row.get("failed", ""):
            raise SystemExit(f"CUDA was started before the fork: {row['failed']}")
        short = {key: found for key, found in row.items() if key not in ("steps", "seconds")}
        cap = f"{way.cap / GB:.2f} GiB" if way.cap else "uncapped"
        print(f"{name}, {cap}, {way.name}, {time.monotonic() - start:.0f} s in all:", short, flush=True)
        return row

    def chosen(self, ways: Iterable[str]) -> list[str]:
        """Leave of some hand-made ways those that were asked for."""
        return [way for way in ways if way in self.given.ways and way not in self.given.without]

    def rival(self, name: str, way: str) -> Row | None:
        """Return a hand-made way's uncapped row, run if it is not there; None where it is too late for that."""
        rows = self.data["rivals"].setdefault(name, {})
        if not settled(rows.get(way)) and not self.late:
            self.keep(rows, way, self.run(name, Way(name=way, fixed=self.given.fixed)))
        found: Row | None = rows.get(way)
        return found

    def cells(self, name: str) -> None:
        """Run a job's hand-made ways, then its budgets, up to the first beyond which nothing changes."""
        if None in [self.rival(name, way) for way in self.chosen(HAND_MADE)]:
            return
        roomy = None
        for budget in sorted(self.given.budgets):
            key, cap = f"{name} {budget:g}", int(budget * GB) - self.data["context_bytes"]
            if key not in self.data["cells"] and roomy:
                self.keep(self.data["cells"], key, {"same_as": roomy})
            elif key not in self.data["cells"] and not self.late:
                self.keep(self.data["cells"], key, self.cell(name, cap))
            if roomy is None and has_room(self.data["cells"].get(key, {}), self.data["rivals"][name]):
                roomy = key
            if key in self.data["cells"]:
                self.offloaders(name, self.data["cells"][key], cap)

    def cell(self, name: str, cap: int) -> Row:
        """Run the fastest rival that really fits a cap, and ours."""
        found: Row = {"rival_name": None, "rival": None, "failed_rivals": {}}
        for way in fitting(self.data["rivals"][name], cap):
            row = self.run(name, self.capped_way(way, cap))
            if "median_s" in row:
                found |= {"rival_name": way, "rival": row}
                break
            found["failed_rivals"][way] = row
        return {**found, "ours": self.run(name, self.capped_way(OURS, cap, exact=self.given.exact))}

    def offloaders(self, name: str, cell: Row, cap: int) -> None:
        """Run the other packages that a cell lacks: in one that is the same as another, too, since they may change."""
        for way in self.chosen(OFFLOADERS):
            if settled(cell.get("peers", {}).get(way)) or self.late:
                continue
            # what fails with all the memory there is fails with less
            failed = self.data["rivals"][name][way].get("failed")
            row = {"failed": f"uncapped, too: {failed}"} if failed else self.run(name, self.capped_way(way, cap))
            self.keep(cell.setdefault("peers", {}), way, row)

    def capped_way(self, way: str, cap: int, *, exact: bool = False) -> Way:
        """Return a way under a cap, timed as often as was asked for."""
        return Way(name=way, cap=cap, rounds=self.given.rounds, exact=exact, fixed=self.given.fixed)

    def caps(self, name: str) -> None:
        """Try how low a job's cap may be: ours with tiles and without, and the thriftiest rivals at their own peaks."""
        job = self.jobs[name]
        if job.tiled_cap:
            self.capped(name, OURS, int(job.tiled_cap * GB))
        for cap in lower_and_lower(job.exact_caps):
            if not has_pictures(self.capped(name, OURS, int(cap * GB), exact=True)):
                break
        for way in self.chosen(THRIFTIEST):
            alone = self.rival(name, way) or {}
            # what it allocates, and where that is too little in pieces, what it reserves
            for peak in ("peak_allocated_bytes", "peak_reserved_bytes"):
                if has_pictures(alone) and has_pictures(self.capped(name, way, alone.get(peak, 0))):
                    break

    def capped(self, name: str, way: str, cap: int, *, exact: bool = False) -> Row:
        """Return the row of a cap, run if it is not there and there is time."""
        key = f"{name} {cap / GB:.2f} {way}{' exact' if exact else ''}"
        if key not in self.data["caps"] and not self.late:
            self.keep(self.data["caps"], key, self.run(name, self.capped_way(way, cap, exact=exact)))
        found: Row = self.data["caps"].get(key, {})
        return found


def settled(row: Row | None) -> bool:
    """Whether a row is there and is not to be run again, as it is where a package was not installed."""
    return row is not None and "MissingPackageError" not in row.get("failed", "")


def lower_and_lower(caps: tuple[float, ...]) -> Iterator[float]:
    """Go through falling caps, and on below them in steps of the last.

    >>> list(lower_and_lower((1.0, 0.8, 0.6)))
    [1.0, 0.8, 0.6, 0.4, 0.2]
    """
    yield from caps
    for number in itertools.count(1) if len(caps) > 1 else ():
        cap = round(caps[-1] - number * (caps[-2] - caps[-1]), 3)
        if cap <= 0:
            return
        yield cap


def fitting(rivals: dict[str, Row], cap: int) -> list[str]:
    """Name diffusers' own ways whose uncapped peak is below a cap, the fastest first."""
    own = {way: row for way, row in rivals.items() if way in RIVALS and has_pictures(row)}
    names = [way for way, row in own.items() if row.get("peak_allocated_bytes", 0) <= cap]
    return sorted(names, key=lambda way: float(rivals[way]["median_s"]))


def has_room(cell: Row, rivals: dict[str, Row]) -> bool:
    """Whether a cell is the same at every larger budget: no rival is faster, and ours was planned as without one."""
    fastest = fitting(rivals, sys.maxsize)[:1] == [cell.get("rival_name")]
    return fastest and has_pictures(cell["ours"]) and cell["ours"]["unrestricted"] is True


def main() -> None:
    """Run what is not in the file yet and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--seconds", type=float, default=500, help="start nothing after this long")
    parser.add_argument("--limit", type=float, default=150, help="how many seconds a process may take")
    parser.add_argument("--jobs", nargs="+", help=", ".join(JOBS))
    parser.add_argument("--budgets", nargs="+", type=float, default=BUDGETS_GB)
    ways: Any = {"nargs": "+", "choices": HAND_MADE, "metavar": "WAY"}
    parser.add_argument("--ways", **ways, default=HAND_MADE, help=f"the only hand-made ways, of {', '.join(HAND_MADE)}")
    parser.add_argument("--without", **ways, default=(), help="hand-made ways that are left out")
    parser.add_argument("--caps", action="store_true", help="how low a cap may be, instead of the budgets")
    parser.add_argument("--rounds", type=int, default=3, help=f"pictures under a cap, if they take up to {LONG_S:g} s")
    parser.add_argument("--exact", action="store_true", help="forbid ours to tile")
    parser.add_argument("--fixed", action="store_true", help="hand-made ways through this package's own offload")
    parser.add_argument("--tiny", action="store_true", help="the emoji model, on a CPU")
    session = Session(parser.parse_args())
    # threads that compute do not survive a fork, nor do those of progress bars
    torch.set_num_threads(1)
    for library in (diffusers.utils, transformers.utils):
        library.logging.set_verbosity_error()
        library.logging.disable_progress_bar()
    session.data |= required(read_machine)
    work = session.caps if session.given.caps else session.cells
    for name in session.given.jobs or session.jobs:
        if not session.late:
            work(name)
    tables = (rival_table(session.data["rivals"]), budget_table(session.data["cells"]), cap_table(session.data["caps"]))
    print("\n\n".join("\n".join(lines) for lines in tables))


if __name__ == "__main__":
    main()
