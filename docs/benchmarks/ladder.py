"""The ladder of memory: what a call takes longer, by the budget of memory, for each way to save it and for our plan.

    python docs/benchmarks/ladder.py docs/benchmarks/ladder.json docs/benchmarks/ladder.png

Predicted, on a CPU: peaks by `predict_memory` for an H100, with text encoders and the plan's margin; seconds are those
of moving weights, none of it taken as hidden behind computing, of exact tiles, and of doing without the instant tier,
which stock diffusers does everywhere: from figures of an H100 (`planning/timing.py`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from diffusers_turbo import DeviceFacts, plan
from diffusers_turbo.bench.architectures import build
from diffusers_turbo.bench.environment import read_environment
from diffusers_turbo.bench.figures import PALETTE, add_notes, add_titles, new_figure, pick, quiet_frame, save_figure
from diffusers_turbo.facts.pipeline import read_pipeline
from diffusers_turbo.planning.options import (
    CUDAGraphs,
    GroupOffload,
    ModelOffload,
    Options,
    SequentialOffload,
    VAEExactTiling,
    VAETiling,
)
from diffusers_turbo.planning.timing import STEPS, added_seconds, denoiser_calls, missed_seconds
from diffusers_turbo.planning.units import GIB
from diffusers_turbo.prediction.predict import Predictor

JOBS = {"SD1.5, 512x512": ("sd15", 512), "SDXL, 1024x1024": ("sdxl", 1024)}
BUDGETS_GIB = (
    *(0.1875 + 0.0625 * sixteenth for sixteenth in range(5)),
    *(0.5 + 0.25 * quarter for quarter in range(14)),
    *(4.25 + 0.5 * half for half in range(15)),
)

LEAVES = GroupOffload(offload_type="leaf_level", use_stream=True)
TILES = VAETiling(tile_size=256)
MEMORY = ("offload", "vae_", "slicing")
"""What the names of switches for memory hold."""

WAYS: dict[str, tuple[Options, ...]] = {
    "everything on the GPU": (),
    "exact tiles": (VAEExactTiling(),),
    "lossy tiles of 256 px": (TILES,),
    "model offload": (ModelOffload(),),
    "leaf offload": (LEAVES,),
    "sequential offload": (SequentialOffload(),),
    "lossy tiles, leaf offload": (TILES, LEAVES),
}
"""Ways that take one size of memory, whatever there is."""


def climb(name: str, side: int) -> dict[str, Any]:
    """Predict each way, and plan for each budget."""
    pipe = build(name, dtype=torch.float16, device="meta")
    device, facts = DeviceFacts.card("H100"), read_pipeline(pipe)
    predictor = Predictor(pipe, device=device)
    ways = {
        way: {
            "needed_gib": predictor.estimate(facts, side, side, 1, list(options)).needed_bytes / GIB,
            "added_s": added_seconds(facts, options) + missed_seconds(facts),
        }
        for way, options in WAYS.items()
    }
    plans = []
    for budget in BUDGETS_GIB:
        made = plan(pipe, device, height=side, width=side, vram_budget=int(budget * GIB), estimates=predictor.estimate)
        taken = [step.typed_options() for step in made.steps]
        memory = [step.action for step in made.steps if any(part in step.action for part in MEMORY)]
        plans.append(
            {
                "budget_gib": round(budget, 3),
                "fits": made.fits,
                "exact": made.exact,
                "needed_gib": made.after.needed_bytes / GIB if made.after else None,
                "added_s": added_seconds(facts, taken)
                + (0 if CUDAGraphs in map(type, taken) else missed_seconds(facts) * denoiser_calls(facts, taken, 1)),
                "switches": memory,
            }
        )
    return {"ways": ways, "plans": plans}


def draw(data: dict[str, Any]) -> Any:
    """Draw a panel for each job."""
    figure = new_figure(11, 4.8)
    panels: Sequence[Any] = figure.subplots(1, len(data["jobs"]))
    for axes, (job, found) in zip(panels, data["jobs"].items(), strict=True):
        most = BUDGETS_GIB[-1]
        for index, (way, row) in enumerate(found["ways"].items()):
            axes.plot(
                [row["needed_gib"], most],
                [row["added_s"]] * 2,
                color=pick(PALETTE, index),
                linestyle=":" if "lossy" in way else "-",
                linewidth=1.4,
                marker="|",
                markevery=[0],
                markersize=10,
                label=way,
            )
        fits = [row for row in found["plans"] if row["fits"]]
        for exact, style in ((True, "-"), (False, ":")):
            if all(row["exact"] != exact for row in fits):
                continue
            axes.plot(
                [row["budget_gib"] for row in fits],
                [row["added_s"] if row["exact"] == exact else float("nan") for row in fits],
                color=PALETTE[-1],
                linewidth=3,
                linestyle=style,
                marker="" if exact else "o",
                label=f"auto_optimize{'' if exact else ', with lossy tiles'}",
            )
        axes.set_xscale("log")
        axes.set_yscale("symlog", linthresh=0.5)
        axes.set_ylim(-0.05, None)
        ticks = [tick for tick in (0.25, 0.5, 1, 2, 3, 4, 6, 8, 12) if tick <= most]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set_yticks([0, 0.5, 1, 2, 5, 10, 20, 50], ["0", "0.5", "1", "2", "5", "10", "20", "50"])
        axes.set_xlabel("memory it may take (GiB, margin included)")
        axes.grid(visible=True, alpha=0.25)
        quiet_frame(axes)
        add_titles(axes, job)
    panels[0].set_ylabel(f"what a call of {STEPS} steps takes longer (s, at most)")
    panels[-1].legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=9)
    add_notes(
        figure,
        ["Predicted: peaks for an H100, text encoders included; seconds of moving weights, exact tiles, no graphs."],
    )
    return figure


def main(path: Path, picture: Path) -> None:
    """Predict, write the JSON and draw."""
    jobs = {job: climb(*what) for job, what in JOBS.items()}
    data = {"environment": read_environment("cpu", measure=False), "steps": STEPS, "jobs": jobs}
    path.write_text(json.dumps(data, indent=1) + "\n")
    save_figure(lambda: draw(data), picture)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
