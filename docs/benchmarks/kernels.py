"""What the fused kernels take beside plain PyTorch and torch.compile, on the shapes of SD1.5, SDXL and their VAEs.

python docs/benchmarks/kernels.py docs/benchmarks/kernels-h100.json [--quick] [--sweep] [--dtype float16]

Every way is recorded in a CUDA graph of many calls, so that what is measured is the GPU and not Python; the ways take
turns, and the median of the rounds counts. A small tensor stays in the cache between calls, as it does between two
layers of a model. GB/s counts what must be read and written at least; the share is that of a large copy's rate on the
same device, and says little of what multiplies (linear_geglu, upsample_conv). Plain GroupNorm includes the copy back to
channels-last that the next convolution would ask for. Without a GPU, and with TRITON_INTERPRET=1, tiny shapes show that
the script works; its times then mean nothing.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusers_turbo.kernels import KERNELS, unavailable
from diffusers_turbo.kernels.add_layer_norm import add_layer_norm_launch
from diffusers_turbo.kernels.bias_residual import bias_residual_launch
from diffusers_turbo.kernels.geglu import geglu_launch
from diffusers_turbo.kernels.group_norm import group_norm_launch
from diffusers_turbo.kernels.linear_geglu import PERSISTENT, SINGLE
from diffusers_turbo.kernels.upsample_conv import upsample_conv_launch

Job = Callable[[], Any]

# model, batch, channels, side: of norms in the UNet (guidance: batch 2) and in the VAE's decoder
IMAGES = [
    ("SD1.5 512", 2, 320, 64),
    ("SD1.5 512", 2, 960, 64),
    ("SD1.5 512", 2, 640, 32),
    ("SD1.5 512", 2, 1920, 32),
    ("SD1.5 512", 2, 1280, 16),
    ("SD1.5 512", 2, 2560, 16),
    ("SD1.5 512", 2, 1280, 8),
    ("SDXL 1024", 2, 320, 128),
    ("SDXL 1024", 2, 640, 64),
    ("SDXL 1024", 2, 1280, 32),
    ("SDXL 1024", 2, 2560, 32),
    ("VAE 512", 1, 512, 64),
    ("VAE 512", 1, 512, 256),
    ("VAE 512", 1, 256, 512),
    ("VAE 512", 1, 128, 512),
    ("VAE 1024", 1, 128, 1024),
]
# model, batch, tokens, width of the transformer
TOKENS = [
    ("SD1.5 512", 2, 4096, 320),
    ("SD1.5 512", 2, 1024, 640),
    ("SD1.5 512", 2, 256, 1280),
    ("SDXL 1024", 2, 4096, 640),
    ("SDXL 1024", 2, 1024, 1280),
]
# model, batch, channels, side: of what is upsampled and convolved
UPSAMPLED = [
    ("SD1.5 512", 2, 1280, 16),
    ("SD1.5 512", 2, 640, 32),
    ("SDXL 1024", 2, 1280, 32),
    ("SDXL 1024", 2, 640, 64),
    ("VAE 512", 1, 512, 64),
    ("VAE 512", 1, 512, 128),
    ("VAE 512", 1, 256, 256),
]
QUICK_IMAGES, QUICK_TOKENS, QUICK_UPSAMPLED = [IMAGES[0], IMAGES[4], IMAGES[14]], TOKENS[:1], UPSAMPLED[2:3]
TINY_IMAGES, TINY_TOKENS, TINY_UPSAMPLED = [("tiny", 1, 32, 4)], [("tiny", 1, 4, 64)], [("tiny", 1, 16, 4)]
GROUPS = 32


@dataclass(frozen=True)
class Case:
    """One kernel on one shape.

    Attributes:
        least_bytes: what must be read and written by any implementation.
        launches: for a sweep: what to call each set of launch parameters, and the set.
    """

    kernel: str
    model: str
    shape: list[int]
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    least_bytes: int
    launches: dict[str, Any]


def cases(
    images: list[Any], tokens: list[Any], upsampled: list[Any], dtype: torch.dtype, device: str
) -> Iterator[Case]:
    """Every kernel on the shapes it has in these models; tensors are made one case at a time."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    for model, batch, channels, side in images:
        x = randn(batch, channels, side, side).to(memory_format=torch.channels_last)
        rule = group_norm_launch(channels, side * side, GROUPS)
        launches = {
            f"split, tile {rows} x {columns} x {turns}": replace(
                rule, split=True, rows=rows, columns=columns, tile_rows=rows * turns
            )
            for rows, columns, turns in ((32, 64, 2), (32, 64, 8), (64, 64, 2), (32, 128, 4), (16, 128, 4))
        }
        if not rule.split:
            launches |= {f"single, {n} warps": replace(rule, warps=n) for n in (4, 8, 16)}
        arguments = (x, GROUPS, *randn(2, channels))
        yield Case("group_norm", model, list(x.shape), arguments, {"silu": True}, 2 * size(x), launches)
        tile = bias_residual_launch(channels)
        launches = {f"{n} rows, {w} warps": replace(tile, rows=n, warps=w) for n, w in ((16, 4), (64, 4), (64, 8))}
        yield Case("bias_residual", model, list(x.shape), (x, x.flip(0), randn(channels)), {}, 3 * size(x), launches)
    for model, batch, length, width in tokens:
        x = randn(batch, length, 8 * width)
        wide = geglu_launch(4 * width)
        launches = {
            f"{rows} x {n}": replace(wide, rows=rows, columns=n) for rows, n in ((4, 256), (16, 256), (2, 1024))
        }
        yield Case("geglu", model, list(x.shape), (x,), {}, size(x) * 3 // 2, launches)
        if (device, dtype) in KERNELS["linear_geglu"].places():
            arguments = (randn(batch, length, width), randn(8 * width, width) * width**-0.5, randn(8 * width))
            least = sum(map(size, arguments)) + size(x) // 2
            launches = {"persistent": PERSISTENT, "single": SINGLE}
            yield Case("linear_geglu", model, [batch, length, width], arguments, {}, least, launches)
        x, residual = randn(2, batch, length, width)
        row = add_layer_norm_launch(width)
        launches = {f"{n} rows, {w} warps": replace(row, rows=n, warps=w) for n, w in ((1, 4), (2, 4), (4, 4), (4, 8))}
        arguments = (x, residual, *randn(2, width))
        yield Case("add_layer_norm", model, list(x.shape), arguments, {}, 4 * size(x), launches)
    for model, batch, channels, side in upsampled:
        x, weight = randn(batch, channels, side, side), randn(channels, channels, 3, 3) / (9 * channels) ** 0.5
        x, weight = (tensor.to(memory_format=torch.channels_last) for tensor in (x, weight))
        tile = upsample_conv_launch(channels)
        launches = {f"{n} rows, {w} warps": replace(tile, rows=n, warps=w) for n, w in ((8, 2), (16, 2), (32, 8))}
        arguments = (x, weight, randn(channels))
        yield Case("upsample_conv", model, list(x.shape), arguments, {}, 5 * size(x) + size(weight), launches)


def size(x: Tensor) -> int:
    """Bytes of a tensor's elements."""
    return x.numel() * x.element_size()


def ways(case: Case, compile_too: bool, sweep: bool) -> dict[str, Job]:
    """What is compared on one case; each is called without arguments."""
    kernel = KERNELS[case.kernel]

    def plain() -> Any:
        output = kernel.plain(*case.arguments, **case.options)
        return output.contiguous(memory_format=torch.channels_last) if case.kernel == "group_norm" else output

    jobs: dict[str, Job] = {
        "kernel": lambda: kernel.run(*case.arguments, **case.options),
        "plain": plain,
    }
    if compile_too:
        torch.compiler.reset()  # else the shapes before this one make it compile for any shape
        jobs["compiled"] = torch.compile(plain, dynamic=False)
    if sweep:
        for name, launch in case.launches.items():
            jobs[name] = lambda launch=launch: kernel.run(*case.arguments, **case.options, launch=launch)
    return jobs


def timer(job: Job, calls: int, device: str) -> Callable[[], float]:
    """A function that says how many microseconds one call of `job` takes on the device."""
    job()  # compiles, which must not happen while a graph is recorded
    if device == "cpu":

        def on_cpu() -> float:
            start = time.perf_counter()
            job()
            return (time.perf_counter() - start) * 1e6

        return on_cpu
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            job()

    def on_gpu() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3 / calls

    return on_gpu


def interleaved(jobs: dict[str, Job], rounds: int, calls: int, device: str) -> dict[str, float]:
    """Median microseconds of each job, timed in turns; the first turn warms up."""
    timers = {name: timer(job, calls, device) for name, job in jobs.items()}
    turns = [{name: one() for name, one in timers.items()} for _ in range(rounds + 1)]
    return {name: statistics.median(turn[name] for turn in turns[1:]) for name in jobs}


def copy_rate(rounds: int, device: str) -> float:
    """GB/s of a copy too large for the cache: what a kernel bound by memory can reach."""
    source = torch.empty(2**20 if device == "cpu" else 2**29, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    micros = interleaved({"copy": lambda: target.copy_(source)}, rounds, 4, device)["copy"]
    return 2 * size(source) / micros / 1e3


def main(argv: list[str] | None = None) -> None:
    """Measure, write, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="where the JSON goes")
    parser.add_argument("--quick", action="store_true", help="four shapes, few rounds, no torch.compile")
    parser.add_argument("--sweep", action="store_true", help="other launch parameters too")
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16", "float32"])
    options = parser.parse_args(argv)
    if reasons := unavailable():
        parser.error("; ".join(reasons))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes = (QUICK_IMAGES, QUICK_TOKENS, QUICK_UPSAMPLED) if options.quick else (IMAGES, TOKENS, UPSAMPLED)
    rounds, calls = (3, 5) if options.quick else (11, 20)
    if device == "cpu":
        shapes, rounds = (TINY_IMAGES, TINY_TOKENS, TINY_UPSAMPLED), 1

    rows = []
    with torch.no_grad():
        rate = copy_rate(rounds, device)
        for case in cases(*shapes, getattr(torch, options.dtype), device):
            jobs = ways(case, device == "cuda" and not options.quick, options.sweep)
            for way, micros in interleaved(jobs, rounds, calls, device).items():
                gigabytes = case.least_bytes / micros / 1e3
                row = {"kernel": case.kernel, "model": case.model, "shape": case.shape, "way": way}
                rows.append(
                    row | {"us": round(micros, 2), "gb_s": round(gigabytes, 1), "share": round(gigabytes / rate, 3)}
                )
    environment = {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "torch": torch.__version__,
        "triton": __import__("triton").__version__,
        "dtype": options.dtype,
        "rounds": rounds,
        "copy_gb_s": round(rate, 1),
    }
    options.output.write_text(json.dumps({"environment": environment, "rows": rows}, indent=1) + "\n")
    print(f"{environment['device']}, {options.dtype}, copy {rate:.0f} GB/s")
    for row in rows:
        shape = "x".join(map(str, row["shape"]))
        print(
            f"{row['kernel']:15}{row['model']:11}{shape:18}{row['way']:26}{row['us']:9.1f} us{row['gb_s']:9.0f} GB/s"
            f"{row['share']:7.0%}"
        )


if __name__ == "__main__":
    main()
