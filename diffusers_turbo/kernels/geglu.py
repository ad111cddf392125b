"""The second half of GEGLU: `value * gelu(gate)` in one pass, where eager PyTorch makes two and stores the gelu.

Noam Shazeer, GLU Variants Improve Transformer: https://arxiv.org/abs/2002.05202
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from .base import Kernel, KernelLimits, device_reasons, grad_reasons, launch_from, on_device_of, refuse, rounded_once
from .lazy import jit

if TYPE_CHECKING:
    import triton.language as tl

LIMITS = KernelLimits(kernel="geglu", layout="a contiguous [.., 2D]")

TOLERANCE = rounded_once(1e-6)  # for erf in fp32


@dataclass(frozen=True, kw_only=True)
class GegluLaunch:
    """How the work is cut: a program takes a tile of `rows` x `columns` outputs with `warps` x 32 threads."""

    rows: int
    columns: int
    warps: int


def geglu_launch(width: int) -> GegluLaunch:
    """The tile for rows of D = `width` outputs: 2048 outputs, 16 a thread, so that each loads whole 16-byte vectors.

    256 columns divide the 1280, 2560 and 5120 of SD1.5 and SDXL: no lane idles.
    """
    columns = min(256, 1 << max(width - 1, 0).bit_length())
    return GegluLaunch(rows=2048 // columns, columns=columns, warps=4)


def geglu(x: Tensor, *, launch: GegluLaunch | None = None) -> Tensor:
    """Halve the last dimension: the first half times the erf-gelu of the second.

    Args:
        x: `[.., 2D]`, what the projection of diffusers' `GEGLU` gives.
        launch: another tile than `geglu_launch` chooses.

    Returns:
        `[.., D]` of the dtype of `x`; computed in fp32 and rounded once.

    Raises:
        NotSupportedError: with the reasons `geglu_reasons` gives.
    """
    refuse(LIMITS, grad_reasons(LIMITS, x))
    output: Tensor = _op(x, [] if launch is None else list(astuple(launch)))
    return output


def geglu_plain(x: Tensor) -> Tensor:
    """`geglu` in plain PyTorch, as diffusers computes it.

    >>> geglu_plain(torch.tensor([[2.0, 3.0, 0.0, 100.0]]))
    tensor([[  0., 300.]])
    """
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)


def geglu_reasons(x: Tensor, *, launch: GegluLaunch | None = None) -> list[str]:
    """Why `geglu` cannot take these arguments; empty when it can."""
    return device_reasons(LIMITS, x.device, x.dtype) + geglu_misfits(x)


def geglu_misfits(x: Tensor, *, launch: GegluLaunch | None = None) -> list[str]:
    """`geglu_reasons` but for the device."""
    reasons = grad_reasons(LIMITS, x)
    if x.ndim == 0 or x.shape[-1] % 2:
        reasons.append(f"geglu halves the last dimension, the shape is {list(x.shape)}")
    if not x.is_contiguous():
        reasons.append("the tensor is not contiguous")
    return reasons


KERNEL = Kernel(
    run=geglu,
    plain=geglu_plain,
    misfits=geglu_misfits,
    reasons=geglu_reasons,
    limits=LIMITS,
    tolerance=TOLERANCE,
)


@torch.library.custom_op("diffusers_turbo::geglu", mutates_args=(), schema="(Tensor x, int[] launch) -> Tensor")
def _op(x: Tensor, launch: Sequence[int]) -> Tensor:
    refuse(LIMITS, geglu_reasons(x))
    width = x.shape[-1] // 2
    output = x.new_empty(*x.shape[:-1], width)
    if output.numel() == 0:
        return output
    tile = launch_from(GegluLaunch, launch) if launch else geglu_launch(width)
    rows = output.numel() // width
    grid = (-(-rows // tile.rows), -(-width // tile.columns))
    with on_device_of(x):
        _geglu_kernel[grid](x, output, rows, width, ROWS=tile.rows, COLUMNS=tile.columns, num_warps=tile.warps)
    return output


@_op.register_fake
def _(x: Tensor, launch: Sequence[int]) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


@jit("rows")
def _geglu_kernel(
    x: tl.tensor, output: tl.tensor, rows: tl.tensor, width: tl.tensor, ROWS: tl.constexpr, COLUMNS: tl.constexpr
) -> None:
    # The tile's first element in int64, since the tensor may pass 2^31 elements; within a tile int32 is enough.
    first = tl.program_id(0) * ROWS
    row = tl.arange(0, ROWS)[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    present = (first + row < rows) & (column < width)
    source = x + first.to(tl.int64) * width * 2 + row * (width * 2) + column
    value = tl.load(source, mask=present, other=0).to(tl.float32)
    gate = tl.load(source + width, mask=present, other=0).to(tl.float32)
    result = value * (0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)))
    tl.store(output + first.to(tl.int64) * width + row * width + column, result.to(output.dtype.element_ty), present)
