"""The main job on the embedded model: pictures as diffusers makes them, and again after `auto_optimize(pipe)`.

Writes them side by side into a PNG and prints the report: what was switched on and why, times, first-image time, and
how far the pictures are apart. Runs on whatever is there, a GPU or a CPU.

    python examples/side_by_side.py [--out outputs/side_by_side.png] [--steps 20] [--rounds 7]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from diffusers_turbo import auto_optimize
from diffusers_turbo.bench.loading import load_model
from diffusers_turbo.verification.check import Yardstick
from diffusers_turbo.verification.inputs import make_inputs
from diffusers_turbo.verification.sheet import amplified, save_rows

MODEL = Path(__file__).parent / "emoji_sd"
PROMPTS = (
    "a flat emoji of rocket",
    "a 3d emoji of octopus",
    "a gradient emoji of strawberry",
    "a noto emoji of snowman",
)


def draw(pipe: Any, prompt: str, steps: int) -> None:
    """Make one picture."""
    pipe(prompt, num_inference_steps=steps, generator=torch.Generator().manual_seed(0), output_type="pt").images.cpu()


def seconds(work: Callable[[], Any]) -> float:
    """Time some work that ends on the host."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("outputs/side_by_side.png"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = "float16" if device == "cuda" else "float32"

    pipes = {"diffusers": load_model(str(MODEL), dtype, device), "auto_optimize": load_model(str(MODEL), dtype, device)}
    planning = seconds(lambda: auto_optimize(pipes["auto_optimize"]))
    first = {name: seconds(lambda pipe=pipe: draw(pipe, PROMPTS[0], given.steps)) for name, pipe in pipes.items()}
    times: dict[str, list[float]] = {name: [] for name in pipes}
    for _ in range(given.rounds):  # interleaved, so that a busy moment of the machine hits both
        for prompt in PROMPTS:
            for name, pipe in pipes.items():
                times[name].append(seconds(lambda pipe=pipe, prompt=prompt: draw(pipe, prompt, given.steps)))

    yardstick = Yardstick(pipes["diffusers"], make_inputs(PROMPTS, steps=given.steps))
    found = {name: yardstick.measure(pipe) for name, pipe in pipes.items()}
    stock, ours = (check.made[0] for check in found.values())
    factor, difference = amplified(ours, stock)
    rows = {"diffusers": stock, "auto_optimize": ours, f"difference x {factor:g}": difference}
    save_rows(rows, given.out)

    print(pipes["auto_optimize"].turbo_report())
    before, after = (statistics.median(spent) for spent in times.values())
    print(f"\n{given.steps} steps, {device}, {dtype}, medians of {given.rounds} interleaved rounds")
    print(f"{'':24}{'diffusers':>12}{'auto_optimize':>15}")
    print(f"{'seconds a picture':24}{before:12.3f}{after:15.3f}   {before / after:.2f} times as fast")
    print(f"{'first picture, seconds':24}{first['diffusers']:12.3f}{planning + first['auto_optimize']:15.3f}")
    decibels = [check.ours.psnr_db for check in found.values()]
    print(f"{'dB from naive fp32':24}{decibels[0]:12.1f}{decibels[1]:15.1f}")
    print(f"\n{found['auto_optimize']}")
    print(f"side by side: {given.out}")


if __name__ == "__main__":
    main()
