"""A convolution's bias and a residual in one pass, where eager PyTorch adds each in a pass of its own.

cuDNN's convolutions come without their bias in PyTorch, which adds it to the result afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .base import (
    Kernel,
    KernelLimits,
    channels_innermost,
    device_reasons,
    grad_reasons,
    launch_from,
    on_device_of,
    refuse,
    rounded_once,
    vector_reasons,
)
from .lazy import jit

if TYPE_CHECKING:
    import triton.language as tl

LIMITS = KernelLimits(kernel="bias_residual", layout="two [B, C, ..] alike, channels innermost (torch.channels_last)")

TOLERANCE = rounded_once(2e-7)  # for two sums in fp32


@dataclass(frozen=True, kw_only=True)
class BiasResidualLaunch:
    """How the work is cut: a program takes `rows` positions x `columns` channels with `warps` x 32 threads."""

    rows: int
    columns: int
    warps: int


def bias_residual_launch(channels: int) -> BiasResidualLaunch:
    """The tile for C channels: 2048 elements, 16 a thread; 64 columns divide the channels of SD and SDXL."""
    columns = min(64, 1 << max(channels - 1, 0).bit_length())
    return BiasResidualLaunch(rows=2048 // columns, columns=columns, warps=4)


def bias_residual(x: Tensor, residual: Tensor, bias: Tensor, *, launch: BiasResidualLaunch | None = None) -> Tensor:
    """Add a bias to each channel, and a residual.

    Args:
        x, residual: `[B, C, H, W]` in torch.channels_last, or any `[B, C, ..]` with channels innermost in memory.
        bias: `[C]`.
        launch: another tile than `bias_residual_launch` chooses.

    Returns:
        Shape, dtype and strides of `x`; computed in fp32 and rounded once.

    Raises:
        NotSupportedError: with the reasons `bias_residual_reasons` gives.
    """
    refuse(LIMITS, grad_reasons(LIMITS, x, residual, bias))
    output: Tensor = _op(x, residual, bias, [] if launch is None else list(astuple(launch)))
    return output


def bias_residual_plain(x: Tensor, residual: Tensor, bias: Tensor) -> Tensor:
    """`bias_residual` in plain PyTorch.

    >>> bias_residual_plain(torch.tensor([[[1.0], [2.0]]]), torch.ones(1, 2, 1), torch.tensor([10.0, 20.0]))
    tensor([[[12.],
             [23.]]])
    """
    return x + bias.reshape(-1, *(1,) * (x.ndim - 2)) + residual


def bias_residual_reasons(
    x: Tensor, residual: Tensor, bias: Tensor, *, launch: BiasResidualLaunch | None = None
) -> list[str]:
    """Why `bias_residual` cannot take these arguments; empty when it can."""
    return device_reasons(LIMITS, x.device, x.dtype) + bias_residual_misfits(x, residual, bias)


def bias_residual_misfits(
    x: Tensor, residual: Tensor, bias: Tensor, *, launch: BiasResidualLaunch | None = None
) -> list[str]:
    """`bias_residual_reasons` but for the device."""
    reasons = grad_reasons(LIMITS, x, residual, bias)
    if x.ndim < 2:
        return [*reasons, f"bias_residual takes [B, C, ..], the shape is {list(x.shape)}"]
    for name, tensor in (("x", x), ("residual", residual)):
        if tensor.ndim != x.ndim or not channels_innermost(tensor):
            reasons.append(f"the channels of {name} are not innermost in memory")
    if residual.shape != x.shape:
        reasons.append(f"x is {list(x.shape)} and residual {list(residual.shape)}")
    if residual.dtype != x.dtype or residual.device != x.device:
        reasons.append(f"x is {x.dtype} on {x.device} and residual {residual.dtype} on {residual.device}")
    return reasons + vector_reasons(LIMITS, x, (x.shape[1],), bias=bias)


KERNEL = Kernel(
    run=bias_residual,
    plain=bias_residual_plain,
    misfits=bias_residual_misfits,
    reasons=bias_residual_reasons,
    limits=LIMITS,
    tolerance=TOLERANCE,
)


@torch.library.custom_op(
    "diffusers_turbo::bias_residual",
    mutates_args=(),
    schema="(Tensor x, Tensor residual, Tensor bias, int[] launch) -> Tensor",
)
def _op(x: Tensor, residual: Tensor, bias: Tensor, launch: Sequence[int]) -> Tensor:
    refuse(LIMITS, bias_residual_reasons(x, residual, bias))
    output = torch.empty_like(x)
    if x.numel() == 0:
        return output
    channels = x.shape[1]
    tile = launch_from(BiasResidualLaunch, launch) if launch else bias_residual_launch(channels)
    rows = x.numel() // channels
    grid = (-(-rows // tile.rows), -(-channels // tile.columns))
    with on_device_of(x):
        _bias_residual_kernel[grid](
            x, residual, bias, output, rows, channels, ROWS=tile.rows, COLUMNS=tile.columns, num_warps=tile.warps
        )
    return output


@_op.register_fake
def _(x: Tensor, residual: Tensor, bias: Tensor, launch: Sequence[int]) -> Tensor:
    return torch.empty_like(x)


@jit("rows")
def _bias_residual_kernel(
    x: tl.tensor,
    residual: tl.tensor,
    bias: tl.tensor,
    output: tl.tensor,
    rows: tl.tensor,
    channels: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    # The tile's first element in int64, since the tensor may pass 2^31 elements; within a tile int32 is enough.
    first = tl.program_id(0) * ROWS
    row = tl.arange(0, ROWS)[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = column < channels
    present = (first + row < rows) & inside
    offset = first.to(tl.int64) * channels + (row * channels + column)
    value = tl.load(x + offset, mask=present, other=0).to(tl.float32)
    value += tl.load(bias + column, mask=inside, other=0).to(tl.float32)
    value += tl.load(residual + offset, mask=present, other=0).to(tl.float32)
    tl.store(output + offset, value.to(output.dtype.element_ty), mask=present)
