"""GEGLU whole: a linear projection with `value * gelu(gate)` of its two halves, which are never stored, in one kernel.

Both halves of a tile come from one product of tensor cores, whose right side is loaded as `[2, columns, depth]`: value
and gate of an output are then in the same thread's registers. Tensors are loaded and stored by Hopper's copy engine
(TMA). On an H100 in float16 it takes 79 us for the largest of SDXL's, `[2048, 1280]` by `[10240, 1280]`, where cuBLAS
takes 81 for the product alone and the halving 21 more (docs/benchmarks/candidates-h100.json).

Noam Shazeer, GLU Variants Improve Transformer: https://arxiv.org/abs/2002.05202
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from .base import (
    DTYPES,
    Kernel,
    KernelLimits,
    device_reasons,
    grad_reasons,
    interpreting,
    launch_from,
    on_device_of,
    refuse,
    rounded_once,
    vector_reasons,
)
from .geglu import geglu_plain
from .lazy import jit

if TYPE_CHECKING:
    import triton.language as tl

STEP = 64
"""K has to be a multiple of it, and D of twice as much: whole tiles, with no row that starts between 16 bytes."""

LIMITS = KernelLimits(
    kernel="linear_geglu",
    layout=f"contiguous [.., K] and [2D, K] of one dtype, K a multiple of {STEP}, D of {2 * STEP}",
    dtypes=(torch.float16, torch.bfloat16),
    lowest_sm=(9, 0),
    highest_sm=(9, 0),
    sources={
        "lowest_sm": "https://docs.nvidia.com/cuda/hopper-tuning-guide/index.html#tensor-memory-accelerator",
        "lowest_sm_by_dtype": "facts/device.py: older cards only emulate bfloat16",
        "highest_sm": "not measured on newer GPUs, whose tensor cores are used in another way",
    },
)

TOLERANCE = {dtype: error for dtype, error in rounded_once(2e-6).items() if dtype in LIMITS.dtypes}
"""For fp32 sums over K and the gelu."""


@dataclass(frozen=True, kw_only=True)
class LinearGegluLaunch:
    """How the work is cut.

    Attributes:
        rows, columns: of the tile of outputs that is computed at a time.
        depth: how much of K is loaded at a time.
        together: as many tiles below each other are computed side by side, and share the weights in the cache.
        stages: loads under way at a time.
        warps: of 32 threads, a program.
        persistent: one program a multiprocessor computes tile after tile, the next one's loads under the end of this
            one's work; else one program a tile.
    """

    rows: int = 128
    columns: int = 128
    depth: int = STEP
    together: int = 16
    stages: int = 4
    warps: int = 8
    persistent: bool = True


PERSISTENT = LinearGegluLaunch()
SINGLE = LinearGegluLaunch(columns=64, together=8, stages=3, persistent=False)


def linear_geglu_launch(rows: int, width: int, multiprocessors: int) -> LinearGegluLaunch:
    """Large tiles one after the other where each multiprocessor has two of them to do, else small ones side by side."""
    tiles = -(-rows // PERSISTENT.rows) * -(-width // PERSISTENT.columns)
    return PERSISTENT if tiles >= 2 * multiprocessors else SINGLE


def linear_geglu(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, launch: LinearGegluLaunch | None = None
) -> Tensor:
    """Project the last dimension and halve it: the first half times the erf-gelu of the second.

    Args:
        x: `[.., K]`.
        weight: `[2D, K]` of the dtype of `x`, as `nn.Linear` keeps it.
        bias: `[2D]`, or None.
        launch: another way than `linear_geglu_launch` chooses.

    Returns:
        `[.., D]` of the dtype of `x`; the product is summed and halved in fp32 and rounded once.

    Raises:
        NotSupportedError: with the reasons `linear_geglu_reasons` gives.
    """
    refuse(LIMITS, grad_reasons(LIMITS, x, weight, bias))
    output: Tensor = _op(x, weight, bias, [] if launch is None else [int(number) for number in astuple(launch)])
    return output


def linear_geglu_plain(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear_geglu` in plain PyTorch.

    >>> linear_geglu_plain(torch.tensor([[2.0]]), torch.tensor([[1.5], [50.0]]))
    tensor([[300.]])
    """
    return geglu_plain(F.linear(x, weight, bias))


def linear_geglu_reasons(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, launch: LinearGegluLaunch | None = None
) -> list[str]:
    """Why `linear_geglu` cannot take these arguments; empty when it can."""
    return device_reasons(LIMITS, x.device, x.dtype) + linear_geglu_misfits(x, weight, bias)


def linear_geglu_misfits(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, launch: LinearGegluLaunch | None = None
) -> list[str]:
    """`linear_geglu_reasons` but for the device."""
    reasons = grad_reasons(LIMITS, x, weight, bias)
    if x.ndim == 0 or weight.ndim != 2 or weight.shape[1] != x.shape[-1]:
        return [*reasons, f"{list(weight.shape)} does not project {list(x.shape)}"]
    both, depth = weight.shape
    if depth == 0 or depth % STEP or both % (4 * STEP):
        reasons.append(f"weight is {list(weight.shape)}: K must be a multiple of {STEP}, 2D of {4 * STEP}")
    if weight.dtype != x.dtype or weight.device != x.device:
        reasons.append(f"x is {x.dtype} on {x.device}, weight {weight.dtype} on {weight.device}")
    for name, tensor in (("x", x), ("weight", weight)):
        if not tensor.is_contiguous():
            reasons.append(f"{name} is not contiguous")
    return reasons + vector_reasons(replace(LIMITS, dtypes=DTYPES), x, (both,), bias=bias)


KERNEL = Kernel(
    run=linear_geglu,
    plain=linear_geglu_plain,
    misfits=linear_geglu_misfits,
    reasons=linear_geglu_reasons,
    limits=LIMITS,
    tolerance=TOLERANCE,
)


@torch.library.custom_op(
    "diffusers_turbo::linear_geglu",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, int[] launch) -> Tensor",
)
def _op(x: Tensor, weight: Tensor, bias: Tensor | None, launch: Sequence[int]) -> Tensor:
    refuse(LIMITS, linear_geglu_reasons(x, weight, bias))
    depth, width = weight.shape[1], weight.shape[0] // 2
    output = x.new_empty(*x.shape[:-1], width)
    if output.numel() == 0:
        return output
    # copied where it begins between 16 bytes, which descriptors cannot say
    x, weight = (tensor if tensor.data_ptr() % 16 == 0 else tensor.clone() for tensor in (x, weight))
    rows = output.numel() // width
    processors = _multiprocessors(x.device)
    way = launch_from(LinearGegluLaunch, launch) if launch else linear_geglu_launch(rows, width, processors)
    described = importlib.import_module("triton.tools.tensor_descriptor").TensorDescriptor.from_tensor
    programs = -(-rows // way.rows) * -(-width // way.columns)
    with on_device_of(x):
        _linear_geglu_kernel[(min(programs, processors) if way.persistent else programs,)](
            described(x.view(rows, depth), [way.rows, way.depth]),
            described(weight.view(2, width, depth), [2, way.columns, way.depth]),
            x if bias is None else bias,
            described(output.view(rows, width), [way.rows, way.columns]),
            rows,
            width,
            BIAS=bias is not None,
            STEPS=depth // way.depth,
            ROWS=way.rows,
            COLUMNS=way.columns,
            DEPTH=way.depth,
            TOGETHER=way.together,
            PERSISTENT=bool(way.persistent),
            num_stages=way.stages,
            num_warps=way.warps,
        )
    return output


@_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, launch: Sequence[int]) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0] // 2)


@cache
def _multiprocessors(device: torch.device) -> int:
    if interpreting():  # its loops cannot begin at the program's number, so none is to be chosen
        return 1 << 30
    return torch.cuda.get_device_properties(device).multi_processor_count


@jit()
def _gelu(x: tl.tensor) -> tl.tensor:
    # x * Phi(x) to 3e-7: the polynomial is log2(2 * Phi(-|x|)) / |x|. One exp2, and no cases as in erf.
    size = tl.abs(x)
    power = -8.249931511272734e-07 * size + 1.4624984032707289e-05
    power = power * size - 6.73452450428158e-05
    power = power * size - 0.000421085802372545
    power = power * size + 0.00742132144162941
    power = power * size - 0.052726320922374725
    power = power * size - 0.4591415822505951
    power = power * size - 1.151111364364624
    return tl.maximum(x, 0.0) - size * tl.exp2(power * size - 1.0)


@jit()
def _tile(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    output: tl.tensor,
    tile: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    BIAS: tl.constexpr,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    TOGETHER: tl.constexpr,
) -> None:
    # Tiles that share weights and rows are neighbours, so that the cache holds both.
    down, across = tl.cdiv(rows, ROWS), tl.cdiv(width, COLUMNS)
    band = tile // (TOGETHER * across)
    height = tl.minimum(down - band * TOGETHER, TOGETHER)
    place = tile % (TOGETHER * across)
    row, column = (band * TOGETHER + place % height) * ROWS, (place // height) * COLUMNS
    both = tl.zeros((ROWS, 2 * COLUMNS), tl.float32)
    for step in range(STEPS):
        right = weight.load([0, column, step * DEPTH]).reshape(2 * COLUMNS, DEPTH)
        both = tl.dot(x.load([row, step * DEPTH]), right.T, both)
    value, gate = tl.split(both.reshape(ROWS, 2, COLUMNS).permute(0, 2, 1))
    if BIAS:
        # at the end: a bias that starts the sums keeps the compiler from loading the next tile under this one
        here = column + tl.arange(0, COLUMNS)
        value += tl.load(bias + here)[None, :].to(tl.float32)
        gate += tl.load(bias + width + here)[None, :].to(tl.float32)
    output.store([row, column], (value * _gelu(gate)).to(output.dtype))


@jit("rows")
def _linear_geglu_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    output: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    BIAS: tl.constexpr,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    TOGETHER: tl.constexpr,
    PERSISTENT: tl.constexpr,
) -> None:
    # Descriptors clip: what is loaded past the last row is zero, what is stored there goes nowhere.
    if PERSISTENT:
        tiles = tl.cdiv(rows, ROWS) * tl.cdiv(width, COLUMNS)
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            _tile(x, weight, bias, output, tile, rows, width, BIAS, STEPS, ROWS, COLUMNS, DEPTH, TOGETHER)
    else:
        tile = tl.program_id(0)
        _tile(x, weight, bias, output, tile, rows, width, BIAS, STEPS, ROWS, COLUMNS, DEPTH, TOGETHER)
