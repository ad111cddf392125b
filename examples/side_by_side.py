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
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw
from torch import Tensor

from diffusers_turbo import auto_optimize, turbo
from diffusers_turbo.parity import distance, judge

MODEL = Path(__file__).parent / "emoji_sd"
PROMPTS = (
    "a flat emoji of rocket",
    "a 3d emoji of octopus",
    "a gradient emoji of strawberry",
    "a noto emoji of snowman",
)


def load(device: str, dtype: torch.dtype) -> Any:
    """Load the emoji model quietly."""
    pipe = StableDiffusionPipeline.from_pretrained(str(MODEL), dtype=dtype, safety_checker=None).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents_for(pipe: Any) -> Tensor:
    """Fixed latents `[P, C, h, w]`, one seed a prompt: the same numbers for every pipeline."""
    side, channels = pipe.unet.config.sample_size, pipe.unet.config.in_channels
    seeds = range(len(PROMPTS))
    return torch.stack([torch.randn(channels, side, side, generator=torch.Generator().manual_seed(s)) for s in seeds])


def make(pipe: Any, latents: Tensor, steps: int) -> Tensor:
    """Make a picture for each start `[P, C, h, w]`, prompts in order: `[P, 3, H, W]` in [0, 1] on the CPU."""
    pictures = []
    for prompt, start in zip(PROMPTS, latents, strict=False):
        start = start[None].to(pipe.device, pipe.unet.dtype)
        pictures.append(pipe(prompt, latents=start, num_inference_steps=steps, output_type="pt").images.float().cpu())
    return torch.cat(pictures)


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """Time some work that ends on the host."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def draw(rows: dict[str, Tensor], amplified: Tensor, path: Path) -> None:
    """Write the rows of pictures under each other, and their difference, amplified 100 times, as the last one."""
    side, margin, label = rows[next(iter(rows))].shape[-1], 6, 18
    lines = {**rows, "difference x 100": amplified}
    width = len(PROMPTS) * (side + margin) + margin
    sheet = Image.new("RGB", (width, len(lines) * (side + label + margin) + margin), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (name, pictures) in enumerate(lines.items()):
        top = margin + row * (side + label + margin)
        pen.text((margin, top), name, fill="black")
        for column, picture in enumerate(pictures):
            pixels = (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
            sheet.paste(Image.fromarray(pixels), (margin + column * (side + margin), top + label))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("outputs/side_by_side.png"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.float32

    stock = load(device, dtype)
    latents = latents_for(stock)
    first_stock, _ = seconds(lambda: make(stock, latents[:1], given.steps))
    optimised = load(device, dtype)
    planning, _ = seconds(lambda: auto_optimize(optimised))
    first_ours, _ = seconds(lambda: make(optimised, latents[:1], given.steps))

    pipes = {"diffusers": stock, "auto_optimize": optimised}
    times: dict[str, list[float]] = {name: [] for name in pipes}
    rows: dict[str, Tensor] = {}
    for _ in range(given.rounds):  # interleaved, so that a busy moment of the machine hits both
        for name, pipe in pipes.items():
            spent, rows[name] = seconds(lambda pipe=pipe: make(pipe, latents, given.steps))
            times[name].append(spent / len(PROMPTS))
    pictures, ours = rows.values()

    naive = turbo(load(device, torch.float32))
    naive.enable_naive_attention()
    reference = make(naive, latents, given.steps)
    stock_apart, ours_apart = distance(pictures, reference), distance(ours, reference)
    verdict = judge(ours_apart, stock_apart, half=dtype is not torch.float32)
    draw(rows, (ours - pictures).abs() * 100, given.out)

    print(optimised.turbo_report())
    before, after = (statistics.median(spent) for spent in times.values())
    print(f"\n{given.steps} steps, {device}, {dtype}, medians of {given.rounds} interleaved rounds")
    print(f"{'':24}{'diffusers':>12}{'auto_optimize':>15}")
    print(f"{'seconds a picture':24}{before:12.3f}{after:15.3f}   {before / after:.2f} times as fast")
    print(f"{'first picture, seconds':24}{first_stock:12.3f}{planning + first_ours:15.3f}")
    print(f"{'dB from naive fp32':24}{stock_apart.psnr_db:12.1f}{ours_apart.psnr_db:15.1f}")
    print(f"pictures apart from diffusers' own: {distance(ours, pictures).psnr_db:.1f} dB", end=", ")
    print("exact" if verdict.exact else f"not exact: {'; '.join(verdict.reasons)}")
    print(f"side by side: {given.out}")


if __name__ == "__main__":
    main()
