"""What could come next for speed, each beside what runs now, on the shapes of SD1.5 and SDXL with guidance.

python docs/benchmarks/candidates.py docs/benchmarks/candidates-h100.json [--only geglu ...] [--arch sd15 sdxl]

    upsample          upsampling, then the convolution with its bias; the convolution of the small picture with folded
                      weights, and each of its three parts; upsampling alone. Of a step, and (batch 1) of a decode
    convolution       cuDNN's first choice; the best of all it offers (`cudnn.benchmark`); patches times weights
    geglu             projection, then the kernel that halves it; on Hopper both in one kernel, cut in several ways
    group-norm        as it runs now; with more or fewer threads; cut into tiles of other sizes
    projections       queries, keys and values by three products, by one
    residual          a product, then its addition to the residual and the norm of the sum in one kernel; the addition
                      in the product, then the norm alone (without biases, which would go into the norms)
    cross-attention   queries, attention over 77 tokens, output; the same with the prompt's keys folded into the weights
                      of the queries and its values into those of the output, both made once a call

Ways are timed as in kernels.py: many calls in a CUDA graph, in turns. `error` is the distance of each from the first in
float32, relative to it; all compute the same up to rounding. Without a GPU, and with TRITON_INTERPRET=1, tiny shapes
show that the script works; its times then mean nothing.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import astuple, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from kernels import interleaved
from torch import Tensor, nn
from torch.nn import functional as F

from diffusers_turbo.bench.architectures import build
from diffusers_turbo.kernels import KERNELS
from diffusers_turbo.kernels.group_norm import group_norm_launch
from diffusers_turbo.kernels.linear_geglu import PERSISTENT, SINGLE

PROMPT = 77


@dataclass(frozen=True)
class Case:
    """One piece of work on one shape; `count` is how often a step has it, `wide` computes it in float32."""

    kind: str
    shape: list[int]
    count: int
    ways: dict[str, Callable[[], Tensor]]
    wide: Callable[[], Tensor]
    operations: float


LAUNCHES = [SINGLE, replace(SINGLE, warps=4), replace(SINGLE, columns=128, stages=4)]
LAUNCHES += [PERSISTENT, replace(PERSISTENT, together=8), replace(PERSISTENT, stages=3)]
"""Of the package's kernel: the two that it chooses from, and their neighbours."""


def work_of(arch: str) -> dict[str, Counter[tuple[int, ...]]]:
    """Count the shapes of each kind of work in one step with guidance, from a forward on the meta device."""
    pipe = build(arch, dtype=torch.float16, device="meta", text_encoders=False)
    unet, found = pipe.unet, {name: Counter() for name in KINDS}

    def note(module: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x = inputs[0] if inputs else None
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            found["convolution"][(*x.shape, module.out_channels, module.stride[0])] += 1
        elif type(module).__name__ == "Upsample2D":
            found["upsample"][(*x.shape, module.out_channels)] += 1
        elif isinstance(module, nn.GroupNorm):
            found["group-norm"][tuple(x.shape)] += 1
        elif type(module).__name__ == "GEGLU":
            found["geglu"][(x.numel() // x.shape[-1], x.shape[-1], output.shape[-1])] += 1
        elif type(module).__name__ == "Attention":
            kind = "cross-attention" if module.is_cross_attention else "projections"
            found[kind][(*x.shape, module.heads)] += 1
            found["residual"][(x.numel() // x.shape[-1], x.shape[-1], x.shape[-1])] += 1
        elif type(module).__name__ == "FeedForward":
            found["residual"][(x.numel() // x.shape[-1], 4 * x.shape[-1], x.shape[-1])] += 1

    upsamplers = [module for module in pipe.vae.decoder.modules() if type(module).__name__ == "Upsample2D"]
    for module in (*unet.modules(), *upsamplers):
        module.register_forward_hook(note)
    side, more = unet.config.sample_size, {}
    with torch.device("meta"):
        if unet.config.addition_embed_type == "text_time":
            more = {"text_embeds": torch.empty(2, 1280).half(), "time_ids": torch.empty(2, 6).half()}
        latents, prompt = torch.empty(2, 4, side, side), torch.empty(2, PROMPT, unet.config.cross_attention_dim)
        unet(latents.half(), torch.tensor(1), encoder_hidden_states=prompt.half(), added_cond_kwargs=more)
        pipe.vae.decode(torch.empty(1, 4, side, side, dtype=pipe.vae.dtype))
    return found


def upsample(shape: tuple[int, ...], draw: Any) -> Any:
    batch, channels, height, width, out = shape
    x, bias = draw(batch, channels, height, width).contiguous(memory_format=torch.channels_last), draw(out)
    weight = draw(out, channels, 3, 3, scale=1 / math.sqrt(9 * channels)).contiguous(memory_format=torch.channels_last)
    kernel, parts = KERNELS["upsample_conv"], torch.ops.diffusers_turbo
    folded = parts.upsample_conv_weight(weight, [])
    y = F.conv2d(x, folded, padding=1)
    ways = {
        "now": lambda: kernel.plain(x, weight, bias),
        "folded": lambda: kernel.run(x, weight, bias),
        "folding alone": lambda: parts.upsample_conv_weight(weight, []),
        "small convolution alone": lambda: F.conv2d(x, folded, padding=1),
        "interleaving alone": lambda: parts.upsample_conv_interleave(y, bias, []),
        "upsampling alone": lambda: F.interpolate(x, scale_factor=2.0, mode="nearest"),
    }
    wide = lambda: kernel.plain(x.float(), weight.float(), bias.float())  # noqa: E731
    return ways, wide, 2 * batch * 4 * height * width * out * channels * 9


def convolution(shape: tuple[int, ...], draw: Any) -> Any:
    batch, channels, height, width, out, stride = shape
    x = draw(batch, channels, height, width).contiguous(memory_format=torch.channels_last)
    weight = draw(out, channels, 3, 3, scale=1 / math.sqrt(9 * channels)).contiguous(memory_format=torch.channels_last)
    flat = weight.permute(0, 2, 3, 1).reshape(out, -1)
    down, across = -(-height // stride), -(-width // stride)

    def by_cudnn(search: bool) -> Tensor:
        # its choices are kept by shape and flags, so the two need different ones; TF32 is nothing to half precision
        flags = torch.backends.cudnn.flags(enabled=True, benchmark=search, benchmark_limit=0, allow_tf32=search)
        with flags if x.is_cuda else nullcontext():
            return F.conv2d(x, weight, stride=stride, padding=1)

    def by_product() -> Tensor:
        padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
        patches = padded.unfold(1, 3, stride).unfold(2, 3, stride).permute(0, 1, 2, 4, 5, 3)
        return (patches.reshape(batch * down * across, -1) @ flat.T).view(batch, down, across, out).permute(0, 3, 1, 2)

    ways = {"cudnn": lambda: by_cudnn(False), "cudnn, searched": lambda: by_cudnn(True)}
    if batch * down * across <= 2048:
        ways["patches"] = by_product
    wide = lambda: F.conv2d(x.float(), weight.float(), stride=stride, padding=1)  # noqa: E731
    return ways, wide, 2 * batch * down * across * out * channels * 9


def geglu(shape: tuple[int, ...], draw: Any) -> Any:
    rows, depth, width = shape
    x, weight, bias = draw(rows, depth), draw(2 * width, depth, scale=depth**-0.5), draw(2 * width)
    halve = KERNELS["geglu"].run
    ways = {"two kernels": lambda: halve(F.linear(x, weight, bias)), "product alone": lambda: F.linear(x, weight, bias)}
    if (x.device.type, x.dtype) in KERNELS["linear_geglu"].places():
        for launch in LAUNCHES:
            name = f"{'persistent' if launch.persistent else 'single'} {tuple(map(int, astuple(launch)[:-1]))}"
            ways[name] = lambda launch=launch: KERNELS["linear_geglu"].run(x, weight, bias, launch=launch)
    wide = lambda: KERNELS["geglu"].plain(F.linear(x.float(), weight.float(), bias.float()))  # noqa: E731
    return ways, wide, 4 * rows * depth * width


def group_norm(shape: tuple[int, ...], draw: Any) -> Any:
    channels = shape[1]
    x, weight, bias = draw(*shape).contiguous(memory_format=torch.channels_last), draw(channels), draw(channels)
    groups = min(32, channels)
    now = group_norm_launch(channels, x[0, 0].numel(), groups)
    cuts = {"now": now, "read twice": replace(now, split=False, held=False, block=8192, warps=32)}
    if now.held:
        cuts |= {f"by {warps} warps": replace(now, warps=warps) for warps in (4, 8, 16)}
    for change in ({}, {"tile_warps": 8}, {"columns": 128}, {"tile_rows": 128}, {"finish_block": 1024}):
        name = " ".join(["split", *(f"{what} {n}" for what, n in change.items())])
        cuts[name] = replace(now, split=True, held=False, **change)
    run = partial(KERNELS["group_norm"].run, x, groups, weight, bias, silu=True)
    ways = {name: partial(run, launch=launch) for name, launch in cuts.items() if name == "now" or launch != now}
    plain = KERNELS["group_norm"].plain
    wide = lambda: plain(x.float(), groups, weight.float(), bias.float(), silu=True)  # noqa: E731
    return ways, wide, 0


def projections(shape: tuple[int, ...], draw: Any) -> Any:
    batch, tokens, width, _ = shape
    x, weight = draw(batch, tokens, width), draw(3 * width, width, scale=width**-0.5)
    parts = weight.chunk(3)
    ways = {
        "three": lambda: torch.stack([F.linear(x, part) for part in parts]),
        "three, not stacked": lambda: [F.linear(x, part) for part in parts][-1],
        "one": lambda: F.linear(x, weight),
    }
    return ways, None, 6 * batch * tokens * width * width


def residual(shape: tuple[int, ...], draw: Any) -> Any:
    rows, depth, width = shape
    x, stream, weight = draw(rows, depth), draw(rows, width), draw(width, depth, scale=depth**-0.5)
    affine = (torch.ones_like(weight[:, 0]), torch.zeros_like(weight[:, 0]), 1e-5)
    add_and_norm = KERNELS["add_layer_norm"].run

    def in_the_product() -> Tensor:
        return F.layer_norm(torch.addmm(stream, x, weight.T), (width,), *affine)

    ways = {
        "two kernels": lambda: add_and_norm(F.linear(x, weight), stream, *affine)[1],
        "added within": in_the_product,
    }
    ways["product alone"] = lambda: F.linear(x, weight)
    ways["product and sum"] = lambda: torch.addmm(stream, x, weight.T)
    wide = lambda: F.layer_norm(F.linear(x.float(), weight.float()) + stream.float(), (width,))  # noqa: E731
    return ways, wide, 2 * rows * depth * width


def cross_attention(shape: tuple[int, ...], draw: Any) -> Any:
    batch, tokens, width, heads = shape
    size = width // heads
    x, key, value = draw(batch, tokens, width), draw(batch, PROMPT, width), draw(batch, PROMPT, width)
    into, out, bias = draw(width, width, scale=width**-0.5), draw(width, width, scale=width**-0.5), draw(width)
    room = -(-PROMPT // 8) * 8  # products want multiples of eight

    def split(states: Tensor) -> Tensor:
        return states.unflatten(-1, (heads, size)).transpose(1, 2)

    def apart(x: Tensor, key: Tensor, value: Tensor, into: Tensor, out: Tensor, bias: Tensor) -> Tensor:
        attended = F.scaled_dot_product_attention(split(F.linear(x, into)), split(key), split(value))
        return F.linear(attended.transpose(1, 2).flatten(2), out, bias)

    # [B, H, C, S] and [B, H, S, C]: x @ folded_key is what the queries have in common with the keys
    folded_key = torch.einsum("hdc,bhsd->bchs", into.view(heads, size, width), split(key)) * size**-0.5
    folded_value = torch.einsum("ohd,bhsd->bhso", out.view(width, heads, size), split(value))
    folded_key = F.pad(folded_key, (0, room - PROMPT)).reshape(batch, width, heads * room)
    folded_value = F.pad(folded_value, (0, 0, 0, room - PROMPT)).reshape(batch, heads * room, width)
    empty = torch.zeros(heads, room, device=x.device, dtype=x.dtype)
    empty[:, PROMPT:] = -torch.inf
    empty = empty.view(1, 1, -1)

    def folded() -> Tensor:
        scores = torch.baddbmm(empty, x, folded_key)
        shares = scores.unflatten(-1, (heads, room)).softmax(-1).flatten(2)
        return torch.baddbmm(bias, shares, folded_value)

    everything = (x, key, value, into, out, bias)
    ways = {"apart": lambda: apart(*everything), "folded": folded}
    ways["product of the folded"] = lambda: torch.bmm(torch.bmm(x, folded_key), folded_value)
    wide = lambda: apart(*(tensor.float() for tensor in everything))  # noqa: E731
    return ways, wide, 4 * batch * tokens * width * (width + PROMPT)


KINDS = {
    "upsample": upsample,
    "convolution": convolution,
    "geglu": geglu,
    "group-norm": group_norm,
    "projections": projections,
    "residual": residual,
    "cross-attention": cross_attention,
}
TINY = {
    "upsample": {(1, 8, 4, 3, 16): 1, (2, 8, 5, 4, 8): 1},
    "convolution": {(1, 8, 4, 4, 8, 1): 1, (1, 8, 5, 4, 8, 2): 1},
    "geglu": {(24, 32, 48): 1},
    "group-norm": {(2, 8, 5, 3): 1},
    "projections": {(1, 4, 8, 2): 1},
    "residual": {(12, 8, 16): 1},
    "cross-attention": {(2, 4, 16, 2): 1},
}


def cases(work: dict[str, Any], only: list[str], device: str, dtype: torch.dtype) -> Iterator[Case]:
    """Make one case at a time."""

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype) * scale

    for kind in only:
        for shape, count in work[kind].items():
            ways, wide, operations = KINDS[kind](shape, draw)
            yield Case(kind, list(shape), count, ways, wide, operations)


def errors(case: Case) -> dict[str, float]:
    """How far each way is from float32, relative to it; not of ways that compute a part only."""
    if case.wide is None:
        return {}
    exact, found = case.wide(), {}
    for name, way in case.ways.items():
        output = way()
        if output.shape == exact.shape and not any(word in name for word in ("product", "alone")):
            found[name] = ((output.float() - exact).norm() / exact.norm()).item()
    return found


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    shape, error = "x".join(map(str, row["shape"])), f"{row['error']:.1e}" if row["error"] is not None else "-"
    return (
        f"{row['arch']:5} {row['kind']:16}{shape:24} x{row['count']:3} {row['way']:34}{row['us']:9.1f} us"
        f"{row['tflops']:7.0f} TFLOP/s  {error:8} {row['saves_us_a_step']:9.1f}"
    )


def text_of(environment: dict[str, str], rows: list[dict[str, Any]]) -> str:
    """JSON with a line for each row."""
    lines = ",\n".join(json.dumps(row) for row in rows)
    return f'{{"environment": {json.dumps(environment)}, "rows": [\n{lines}\n]}}\n'


def main(argv: list[str] | None = None) -> None:
    """Measure; write and print what a step would save, case by case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="where the JSON goes")
    parser.add_argument("--only", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--arch", nargs="+", default=["sd15", "sdxl"])
    options = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rounds, calls, dtype = (7, 10, torch.float16) if device == "cuda" else (1, 1, torch.float32)
    environment = {"device": torch.cuda.get_device_name() if device == "cuda" else "cpu", "torch": torch.__version__}
    rows = []
    for arch in options.arch if device == "cuda" else ["tiny"]:
        work = work_of(arch) if device == "cuda" else TINY
        with torch.no_grad():
            for case in cases(work, options.only, device, dtype):
                off = errors(case)
                times = interleaved(case.ways, rounds, calls, device)
                now = next(iter(times.values()))
                for way, micros in times.items():
                    rows.append(
                        {
                            "arch": arch,
                            "kind": case.kind,
                            "shape": case.shape,
                            "count": case.count,
                            "way": way,
                            "us": round(micros, 2),
                            "tflops": round(case.operations / micros / 1e6, 1),
                            "error": off.get(way),
                            "saves_us_a_step": round((now - micros) * case.count, 1),
                        }
                    )
                    print(line(rows[-1]), flush=True)
                options.output.write_text(text_of(environment, rows))


if __name__ == "__main__":
    main()
