"""What the exact levers do on a CPU: the emoji model's pictures, and one full-size SD1.5 UNet step, interleaved.

python docs/benchmarks/cpu_levers.py docs/benchmarks/cpu-levers.json
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from diffusers_turbo import turbo

EMOJI = Path(__file__).parents[2] / "examples" / "emoji_sd"
LEVERS: dict[str, tuple[str, ...]] = {
    "stock": (),
    "naive": ("enable_naive_attention",),
    "sdpa": ("enable_sdpa",),
    "channels_last": ("enable_channels_last",),
    "fused_qkv": ("fuse_qkv_projections",),
    "traced": ("trace_unet",),
    "traced+channels_last": ("enable_channels_last", "trace_unet"),
}


def emoji(levers: tuple[str, ...]) -> Callable[[], Any]:
    """A 20-step picture of 128 px by the emoji model with these levers on."""
    pipe = turbo(StableDiffusionPipeline.from_pretrained(str(EMOJI), safety_checker=None))
    pipe.set_progress_bar_config(disable=True)
    for lever in levers:
        getattr(pipe, lever)()
    return lambda: pipe("a flat emoji of rocket", num_inference_steps=20, output_type="pt")


def sd15_step(unet: UNet2DConditionModel, layout: torch.memory_format) -> Callable[[], Any]:
    """One step at 512 x 512 with guidance (batch 2), fp32, random weights."""
    inputs = torch.randn(2, 4, 64, 64), torch.tensor(500), torch.randn(2, 77, 768)

    def step() -> None:
        unet.to(memory_format=layout)
        with torch.no_grad():
            unet(*inputs)

    return step


def interleaved(jobs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, Any]]:
    """Time the jobs A, B, C, A, B, C ...; the first round apart."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds + 1):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            times[name].append(round(time.perf_counter() - start, 4))
    return {n: {"median_s": statistics.median(t[1:]), "first_s": t[0], "all_s": t[1:]} for n, t in times.items()}


def main() -> None:
    """Measure and write."""
    warnings.simplefilter("ignore")
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8).eval()
    layouts = {"stock": torch.contiguous_format, "channels_last": torch.channels_last}
    result = {
        "environment": {
            "cpu": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "python": platform.python_version(),
        },
        "emoji_20_steps": interleaved({name: emoji(levers) for name, levers in LEVERS.items()}, 9),
        "sd15_step_512": interleaved({name: sd15_step(unet, layout) for name, layout in layouts.items()}, 7),
    }
    Path(sys.argv[1]).write_text(json.dumps(result, indent=1) + "\n")
    for job in ("emoji_20_steps", "sd15_step_512"):
        for name, row in result[job].items():
            print(f"{job:16}{name:24}{row['median_s']:10.3f} s   first {row['first_s']:.3f} s")


if __name__ == "__main__":
    main()
