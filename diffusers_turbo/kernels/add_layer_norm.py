"""A residual add and the LayerNorm of the sum in one pass: the sum is stored, yet never read back.

Between the parts of diffusers' `BasicTransformerBlock` stand `hidden = output + hidden` and then `norm(hidden)`. The
first norm of a transformer has nothing to add.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from .base import (
    Kernel,
    KernelLimits,
    device_reasons,
    grad_reasons,
    launch_from,
    on_device_of,
    optional,
    refuse,
    rounded_once,
    vector_reasons,
)
from .lazy import jit

if TYPE_CHECKING:
    import triton.language as tl

LARGEST_WIDTH = 8192
"""A program holds a row in registers, 32 values a thread at 8 warps. Diffusion models have rows of 320 to 4096."""

LIMITS = KernelLimits(kernel="add_layer_norm", layout=f"contiguous [.., D] of one shape, D up to {LARGEST_WIDTH}")

TOLERANCE = rounded_once(2e-6)  # for sums in fp32


@dataclass(frozen=True, kw_only=True)
class AddLayerNormLaunch:
    """How the work is cut: a program takes `rows` whole rows with `warps` x 32 threads."""

    rows: int
    warps: int


def add_layer_norm_launch(width: int) -> AddLayerNormLaunch:
    """The tile for rows of D = `width`: 2048 values or one row, whichever is more; 16 a thread, 32 from 8192 on.

    One row a program would leave the short rows of SD1.5 (320) with too little to load at once.
    """
    slots = max(2048, _padded(width))
    return AddLayerNormLaunch(rows=slots // _padded(width), warps=min(8, slots // 512))


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    launch: AddLayerNormLaunch | None = None,
) -> tuple[Tensor, Tensor]:
    """Add two tensors and normalise the sum over its last dimension.

    Mean and variance are taken in two passes over registers, in fp32, of the sum before it is rounded to its dtype.

    Args:
        x, residual: `[.., D]` of one shape and dtype; or no residual.
        weight, bias: `[D]`, or None.
        eps: added to the variance.
        launch: another tile than `add_layer_norm_launch` chooses.

    Returns:
        The sum (`x` itself without a residual) and its norm, each `[.., D]` of the dtype of `x`.

    Raises:
        NotSupportedError: with the reasons `add_layer_norm_reasons` gives.
    """
    refuse(LIMITS, grad_reasons(LIMITS, x, residual, weight, bias))
    cut = [] if launch is None else list(astuple(launch))
    if residual is None:
        return x, _norm_op(x, weight, bias, eps, cut)
    added, normed = _op(x, residual, weight, bias, eps, cut)
    return added, normed


def add_layer_norm_plain(
    x: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """`add_layer_norm` in plain PyTorch.

    >>> add_layer_norm_plain(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0]), eps=0.0)
    (tensor([1., 3.]), tensor([-1.,  1.]))
    """
    added = x if residual is None else x + residual
    return added, F.layer_norm(added, added.shape[-1:], weight, bias, eps)


def add_layer_norm_reasons(
    x: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    launch: AddLayerNormLaunch | None = None,
) -> list[str]:
    """Why `add_layer_norm` cannot take these arguments; empty when it can."""
    return device_reasons(LIMITS, x.device, x.dtype) + add_layer_norm_misfits(x, residual, weight, bias, eps)


def add_layer_norm_misfits(
    x: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    launch: AddLayerNormLaunch | None = None,
) -> list[str]:
    """`add_layer_norm_reasons` but for the device."""
    reasons = grad_reasons(LIMITS, x, residual, weight, bias)
    reasons += vector_reasons(LIMITS, x, tuple(x.shape), residual=residual)
    if residual is not None and residual.dtype != x.dtype:
        reasons.append(f"x is {x.dtype} and residual {residual.dtype}")
    if not x.is_contiguous():
        reasons.append("x is not contiguous")
    if x.ndim == 0:
        return [*reasons, "x has no dimension to normalise over"]
    if x.shape[-1] > LARGEST_WIDTH:
        reasons.append(f"add_layer_norm takes rows up to {LARGEST_WIDTH}, these have {x.shape[-1]}")
    return reasons + vector_reasons(LIMITS, x, (x.shape[-1],), weight=weight, bias=bias)


KERNEL = Kernel(
    run=add_layer_norm,
    plain=add_layer_norm_plain,
    misfits=add_layer_norm_misfits,
    reasons=add_layer_norm_reasons,
    limits=LIMITS,
    tolerance=TOLERANCE,
)

_SCHEMA = "(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps, int[] launch) -> (Tensor, Tensor)"
_NORM_SCHEMA = "(Tensor x, Tensor? weight, Tensor? bias, float eps, int[] launch) -> Tensor"


@torch.library.custom_op("diffusers_turbo::add_layer_norm", mutates_args=(), schema=_SCHEMA)
def _op(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, launch: Sequence[int]
) -> tuple[Tensor, Tensor]:
    added, normed = torch.empty_like(x), torch.empty_like(x)
    _run(x, residual, added, normed, weight, bias, eps, launch)
    return added, normed


@torch.library.custom_op("diffusers_turbo::layer_norm", mutates_args=(), schema=_NORM_SCHEMA)
def _norm_op(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, launch: Sequence[int]) -> Tensor:
    normed = torch.empty_like(x)
    _run(x, None, x, normed, weight, bias, eps, launch)
    return normed


@_op.register_fake
def _(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, launch: Sequence[int]
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


@_norm_op.register_fake
def _(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, launch: Sequence[int]) -> Tensor:
    return torch.empty_like(x)


def _run(
    x: Tensor,
    residual: Tensor | None,
    added: Tensor,
    normed: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    launch: Sequence[int],
) -> None:
    refuse(LIMITS, add_layer_norm_reasons(x, residual, weight, bias, eps))
    if x.numel() == 0:
        return
    width = x.shape[-1]
    rows = x.numel() // width
    tile = launch_from(AddLayerNormLaunch, launch) if launch else add_layer_norm_launch(width)
    with on_device_of(x):
        _add_layer_norm_kernel[(-(-rows // tile.rows),)](
            x,
            added,
            normed,
            *optional(x, residual, weight, bias),
            rows,
            width,
            eps,
            ROWS=tile.rows,
            COLUMNS=_padded(width),
            num_warps=tile.warps,
        )


@jit("has_residual", "has_weight", "has_bias", "rows")
def _add_layer_norm_kernel(
    x: tl.tensor,
    added: tl.tensor,
    normed: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    has_residual: tl.tensor,
    has_weight: tl.tensor,
    has_bias: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    eps: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    # The tile's first element in int64, since the tensor may pass 2^31 elements; within a tile int32 is enough.
    first = tl.program_id(0) * ROWS
    start = first.to(tl.int64) * width
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    offset = row * width + column
    present = (first + row < rows) & (column < width)

    total = tl.load(x + start + offset, mask=present, other=0).to(tl.float32)
    summed = present & (has_residual != 0)
    total += tl.load(residual + start + offset, mask=summed, other=0).to(tl.float32)
    tl.store(added + start + offset, total.to(added.dtype.element_ty), mask=summed)

    mean = tl.sum(total, axis=1)[:, None] / width
    centred = tl.where(column < width, total - mean, 0.0)
    variance = tl.sum(centred * centred, axis=1)[:, None] / width
    scale = tl.load(weight + column, mask=(column < width) & (has_weight != 0), other=1.0).to(tl.float32)
    shift = tl.load(bias + column, mask=(column < width) & (has_bias != 0), other=0).to(tl.float32)
    result = centred * (1.0 / tl.sqrt_rn(variance + eps)) * scale + shift
    tl.store(normed + start + offset, result.to(normed.dtype.element_ty), mask=present)


def _padded(width: int) -> int:
    return 1 << max(width - 1, 0).bit_length()
