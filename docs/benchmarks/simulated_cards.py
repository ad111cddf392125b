"""Small cards simulated on a large GPU: our plan for a budget against the fastest hand-made way that fits it.

python docs/benchmarks/simulated_cards.py docs/benchmarks/simulated-cards-<gpu>.json [--seconds 500] [--jobs sd15-512]

First every hand-made combination of diffusers' own methods runs once a job, uncapped, for its peak and its time. Then,
for each budget, the fastest of them that fits and `auto_optimize(pipe, vram_budget=...)` each run in a process of its
own under a cap on PyTorch's allocator, set before anything is allocated. A card also has to hold the CUDA context, so
its measured size comes off the budget. Weights are made once and loaded from host memory by each process. What the file
holds already is not run again; `--tiny` tries the script on a CPU, without caps.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

GB = 2**30
BUDGETS_GB = (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24)
PROMPT = "a photograph of an astronaut riding a horse"
LONG_S = 8.0
"""A call that takes longer is timed once more only."""

# job: architecture, side in pixels, scheduler, steps
JOBS = {
    "sd15-512": ("sd15", 512, "ddim", 50),
    "sd15-1024": ("sd15", 1024, "ddim", 50),
    "sdxl-1024": ("sdxl", 1024, "euler", 30),
}
TINY = {"emoji": ("examples/emoji_sd", 128, "ddim", 2)}


def _resident(pipe: Any) -> None:
    pipe.to("cuda")


def _model(pipe: Any) -> None:
    pipe.enable_model_cpu_offload()


def _sequential(pipe: Any) -> None:
    pipe.enable_sequential_cpu_offload()


def _blocks(pipe: Any) -> None:
    import torch

    pipe.enable_group_offload(torch.device("cuda"), offload_type="block_level", num_blocks_per_group=1)


def _leaves(pipe: Any) -> None:
    import torch

    pipe.enable_group_offload(torch.device("cuda"), offload_type="leaf_level", use_stream=True)


def _tiled(offload: Callable[[Any], None]) -> Callable[[Any], None]:
    def both(pipe: Any) -> None:
        pipe.vae.enable_tiling()
        offload(pipe)

    return both


PLACES = {
    "resident": _resident,
    "model offload": _model,
    "block offload": _blocks,
    "leaf offload": _leaves,
    "sequential offload": _sequential,
}
RIVALS: dict[str, Callable[[Any], None]] = {
    **PLACES,
    **{f"{name}, tiles": _tiled(place) for name, place in PLACES.items()},
}
"""What a user of diffusers alone can switch on, by name."""

OURS = "auto_optimize"


def make_weights(job: str, folder: Path, *, tiny: bool) -> str:
    """Return the folder of a job's model, made on the GPU if it is not there."""
    import torch

    from diffusers_turbo.bench.architectures import build

    name = (TINY if tiny else JOBS)[job][0]
    if tiny:
        return str(Path(__file__).parents[2] / name)
    path = folder / name
    if not path.exists():
        pipe = build(name, dtype=torch.float16, device="cuda")
        pipe.save_pretrained(path)
    return str(path)


def child(given: argparse.Namespace) -> dict[str, Any]:
    """Run one way of one job in this process."""
    import torch
    from diffusers import DiffusionPipeline

    from diffusers_turbo import auto_optimize, turbo
    from diffusers_turbo.bench.schedulers import set_scheduler

    cuda = torch.cuda.is_available()
    _, side, scheduler, steps = (TINY if given.tiny else JOBS)[given.job]
    row: dict[str, Any] = {}
    cap = None
    if cuda and given.budget:
        free, total = torch.cuda.mem_get_info()
        context = given.context or total - free
        cap = int(given.budget * GB) - context
        row |= {"context_bytes": context, "cap_bytes": cap}
        torch.cuda.set_per_process_memory_fraction(cap / total)
    pipe: Any = DiffusionPipeline.from_pretrained(given.weights, torch_dtype=torch.float16 if cuda else None)
    set_scheduler(pipe, scheduler)
    pipe.set_progress_bar_config(disable=True)

    def picture() -> float:
        start = time.perf_counter()
        made = pipe(PROMPT, height=side, width=side, num_inference_steps=steps, output_type="pt").images.cpu()
        row["finite"] = bool(made.isfinite().all())
        return time.perf_counter() - start

    try:
        if given.way == OURS:
            budget = cap if cap is not None else given.budget and int(given.budget * GB)
            options: dict[str, Any] = {"vram_budget": budget, "exact": given.exact}
            pipe = auto_optimize(pipe, height=side, width=side, steps=steps, **options)
            report = pipe.turbo_report().plan
            row["steps"] = {step.action: dict(step.options) for step in report.steps}
            row["predicted_bytes"] = report.after.peak_bytes if report.after else None
        elif cuda:
            RIVALS[given.way](turbo(pipe) if given.fixed else pipe)
        first = picture()
        rounds = 1 if first > LONG_S else given.rounds
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        row |= {"first_s": first, "seconds": [picture() for _ in range(rounds)]}
        row["median_s"] = statistics.median(row["seconds"])
    except torch.cuda.OutOfMemoryError as error:
        row["out_of_memory"] = " ".join(str(error).split())[:300]
    except Exception as error:
        row["failed"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if cuda:
        row |= {
            "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
            "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
        }
    return row


def alone(*arguments: str) -> dict[str, Any]:
    """Run `child` in a process of its own; what ends it is a result, too."""
    command = [sys.executable, __file__, "-", "--child", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1][:300]}
    row: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return row


def fastest(rivals: dict[str, dict[str, Any]], cap_bytes: float) -> str | None:
    """Name the fastest hand-made way whose uncapped peak is below a cap, None where none is."""
    fitting = {
        name: row["median_s"]
        for name, row in rivals.items()
        if "median_s" in row and row.get("peak_allocated_bytes", 0) <= cap_bytes
    }
    return min(fitting, key=lambda name: fitting[name], default=None)


def table(data: dict[str, Any]) -> list[str]:
    """Return a Markdown table: a row for each job and budget."""
    lines = ["| job | budget | hand-made | s | ours | s | ours / hand-made |", "|---|---|---|---|---|---|---|"]
    for name, row in data["cells"].items():
        rival, ours = row.get("rival") or {}, row["ours"]

        def told(found: dict[str, Any]) -> str:
            return f"{found['median_s']:.2f}" if "median_s" in found else "out of memory" if found else "-"

        both = "median_s" in rival and "median_s" in ours
        share = f"{ours['median_s'] / rival['median_s']:.2f}" if both else "-"
        switches = " + ".join(
            action.removeprefix("enable_") for action in ours.get("steps", {}) if "offload" in action or "vae" in action
        )
        job, _, budget = name.partition(" ")
        cells = (job, f"{budget} GB", row.get("rival_name") or "none fits", told(rival))
        lines.append("| " + " | ".join((*cells, switches or "resident", told(ours), share)) + " |")
    return lines


def main() -> None:
    """Run what is not in the file yet and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--seconds", type=float, default=500, help="start nothing after this long")
    parser.add_argument("--jobs", nargs="+", help=", ".join(JOBS))
    parser.add_argument("--budgets", nargs="+", type=float, default=BUDGETS_GB)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--exact", action="store_true", help="forbid ours to tile")
    parser.add_argument("--fixed", action="store_true", help="hand-made ways through this package's own offload")
    parser.add_argument("--tiny", action="store_true", help="the emoji model, on a CPU")
    for hidden in ("--child", "--job", "--way", "--weights"):
        parser.add_argument(hidden, help=argparse.SUPPRESS, **({"action": "store_true"} if hidden == "--child" else {}))
    for hidden in ("--budget", "--context"):
        parser.add_argument(hidden, type=float, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(child(given)))
        return
    import torch

    from diffusers_turbo.bench.environment import read_environment

    cuda, until = torch.cuda.is_available(), time.monotonic() + given.seconds
    data = json.loads(given.results.read_text()) if given.results.exists() else {"rivals": {}, "cells": {}}
    context = 0
    if cuda:
        free, total = torch.cuda.mem_get_info()
        context = total - free
    data |= {"environment": read_environment("cuda" if cuda else "cpu", measure=False), "context_bytes": context}
    flags = [name for name in ("--tiny", "--exact", "--fixed") if getattr(given, name[2:])]

    def run(job: str, way: str, budget: float) -> dict[str, Any]:
        row = alone(
            *("--job", job, "--way", way, "--weights", weights, "--budget", str(budget), "--context", str(context)),
            *("--rounds", str(given.rounds), *flags),
        )
        told = {name: found for name, found in row.items() if name not in ("steps", "seconds")}
        print(job, budget or "uncapped", way, told, flush=True)
        return row

    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        for job in given.jobs or (TINY if given.tiny else JOBS):
            weights = make_weights(job, Path(folder), tiny=given.tiny)
            rivals = data["rivals"].setdefault(job, {})
            for way in RIVALS:
                if way not in rivals and time.monotonic() < until:
                    rivals[way] = run(job, way, 0)
                    given.results.write_text(json.dumps(data, indent=1) + "\n")
            for budget in given.budgets:
                name = f"{job} {budget:g}"
                if name in data["cells"] or time.monotonic() > until or len(rivals) < len(RIVALS):
                    continue
                rival = fastest(rivals, budget * GB - context)
                cell = {"rival_name": rival, "rival": run(job, rival, budget) if rival else None}
                data["cells"][name] = cell | {"ours": run(job, OURS, budget)}
                given.results.write_text(json.dumps(data, indent=1) + "\n")
    print("\n".join(table(data)))


if __name__ == "__main__":
    main()
