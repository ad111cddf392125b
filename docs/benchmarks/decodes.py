"""What a decode takes whole and in tiles, exact and lossy: seconds, memory, and the distance from the whole.

    python docs/benchmarks/decodes.py docs/benchmarks/decodes-<gpu>.json [--seconds 120] [--tiny]

SD's and SDXL's autoencoder with random weights, in float16 and float32, as diffusers has it and with the switches that
plans take first on such a GPU. The ways take turns, after two rounds that do
not count; memory is the allocator's peak above the weights, in the second of them. Out of memory is a result.
`--tiny`: a small autoencoder on the CPU, to see that the script works.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import Tensor

from diffusers_turbo import turbo
from diffusers_turbo.actions.held_pictures import HeldOnHost
from diffusers_turbo.actions.tiled_calls import ExactDecode, TiledDecode
from diffusers_turbo.bench.architectures import build
from diffusers_turbo.bench.environment import read_environment
from tests import tiny

STEP = 8
"""Pixels per latent."""

FP16, FP32 = torch.float16, torch.float32
SWITCHES = ("enable_channels_last", "enable_pointwise_matmul", "enable_fused_kernels")
"""The instant tier's, without the graphs, which tiles go without."""


@dataclass(frozen=True)
class Job:
    """Decodes of one size and dtype."""

    side: int
    dtype: torch.dtype
    switched: bool

    def __str__(self) -> str:
        ours = "with fused kernels" if self.switched else "stock"
        return f"{self.side}, {str(self.dtype).removeprefix('torch.')}, {ours}"


JOBS = [
    *(Job(side, dtype, True) for side, dtype in [(1024, FP32), (1024, FP16), (512, FP16)]),
    Job(1024, FP32, False),
    Job(1024, FP16, False),
    Job(2048, FP32, True),
]
ROUNDS = 7

Decode = Callable[[Tensor], Tensor]


def ways(vae: Any) -> dict[str, Decode]:
    """Return the ways to decode latents `[1, 4, h, w]`."""

    def exact(tile: int, *, on_host: bool) -> Decode:
        decode = ExactDecode(vae, tile, HeldOnHost() if on_host else None)
        return lambda latents: decode(latents).sample

    def lossy(decode: Callable[[Tensor], Any], tile: int) -> Decode:
        def run(latents: Tensor) -> Tensor:
            vae.tile_latent_min_size, vae.tile_sample_min_size = tile // STEP, tile
            found: Tensor = decode(latents).sample
            return found

        return run

    ours = TiledDecode(vae, STEP)
    return {
        "whole": lambda latents: vae.decode(latents).sample,
        "exact tiles": exact(256, on_host=False),
        "exact tiles, on the host": exact(256, on_host=True),
        "exact tiles of 128, on the host": exact(128, on_host=True),
        "lossy tiles of 512": lossy(ours, 512),
        "lossy tiles of 256": lossy(ours, 256),
        "diffusers' tiles of 512": lossy(vae.tiled_decode, 512),
    }


def timed(decode: Decode, latents: Tensor) -> tuple[Tensor, float, int]:
    """Decode once; return the picture, seconds, and peak bytes."""
    on_gpu, held = latents.device.type == "cuda", 0
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    start = time.perf_counter()
    picture = decode(latents)
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return picture.float().cpu(), seconds, torch.cuda.max_memory_allocated() - held if on_gpu else 0


@torch.no_grad()
def measure(vae: Any, latents: Tensor, rounds: int, until: float) -> dict[str, Any]:
    """Let the ways take turns."""
    rows: dict[str, Any] = {}
    decodes, whole = ways(vae), torch.empty(0)
    for turn in range(-2, rounds):
        for name, decode in decodes.items():
            row = rows.setdefault(name, {"seconds": []})
            if "failed" in row or time.monotonic() > until:
                continue
            try:
                picture, seconds, peak = timed(decode, latents)
            except torch.OutOfMemoryError:
                row["failed"] = "out of memory"
                torch.cuda.empty_cache()
                continue
            if turn >= 0:
                row["seconds"].append(seconds)
                continue
            whole = picture if name == "whole" else whole
            row |= {"first_s": row.get("first_s", seconds), "peak_bytes": peak}
            if len(whole):
                row["rmse_by_std"] = ((picture - whole).square().mean().sqrt() / whole.std()).item()
    for row in rows.values():
        if row["seconds"]:
            row["median_s"] = statistics.median(row["seconds"])
    return rows


def main() -> None:
    """Measure, write the JSON after each job and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--seconds", type=float, default=120, help="start nothing after this long")
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    until = time.monotonic() + given.seconds
    device = "cpu" if given.tiny else "cuda"
    pipe = turbo(tiny.sd())
    if not given.tiny:
        described = build("sdxl", dtype=FP16, device="meta", text_encoders=False).vae
        with torch.device(device):
            pipe.register_modules(vae=type(described).from_config(described.config).eval())
    pipe.to(device)
    jobs: dict[str, Any] = {}
    data = {"environment": read_environment(device, measure=not given.tiny), "jobs": jobs}
    for job in [Job(520, FP32, False)] if given.tiny else JOBS:
        if time.monotonic() > until:
            break
        pipe.vae.to(dtype=job.dtype)
        for switch in SWITCHES if job.switched else ():
            getattr(pipe, switch)()
        size = (1, pipe.vae.config.latent_channels, job.side // STEP, job.side // STEP)
        latents = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(device, job.dtype)
        found = measure(pipe.vae, latents, 1 if given.tiny else ROUNDS, until)
        pipe.turbo_undo()
        jobs[str(job)] = found
        given.results.write_text(json.dumps(data, indent=1) + "\n")
        for name, row in found.items():
            told = (
                f"{row.get('peak_bytes', 0) / 2**20:6.0f} MiB, {row.get('rmse_by_std', 0):.1e} of a standard deviation"
            )
            median = 1000 * row.get("median_s", float("nan"))
            print(f"{job!s:32} {name:32} {median:8.1f} ms  {row.get('failed') or told}", flush=True)


if __name__ == "__main__":
    main()
