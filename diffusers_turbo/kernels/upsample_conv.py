"""Nearest upsampling by 2 folded into the 3x3 convolution after it: 16 of 36 multiplications, the large picture unmade.

A 3x3 window over an upsampled picture sees 2x2 pixels of the small one, and one of four sets of them, by the parity of
its row and its column. In one direction, with taps w0, w1, w2: output 2i sees pixels i-1 and i with w0 and w1 + w2,
output 2i + 1 sees i and i+1 with w0 + w1 and w2; zeros past the border are the same in both. So four 2x2 kernels,
stacked as channels, make all outputs in one convolution of the small picture: with p and q the parities,

    out[b, c, 2i + p, 2j + q] = y[b, (2p + q) * O + c, i + p, j + q] + bias[c]

Three steps: a kernel folds the weights, cuDNN convolves without a bias, a kernel interleaves and adds it. Weights are
folded anew at each call: what is kept could be out of date, and takes memory.
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
    channels_innermost,
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

LIMITS = KernelLimits(
    kernel="upsample_conv",
    layout="[B, I, H, W] and [O, I, 3, 3] of one dtype, channels innermost (torch.channels_last)",
)

TOLERANCE = {dtype: error * (1 if dtype == torch.float32 else 3) for dtype, error in rounded_once(5e-6).items()}
"""For fp32 sums of 4I products, 5120 in SDXL: as many roundings of 2^-24 by chance, 4e-6.

Half precision rounds three times, 2^-11 of a value at most (bfloat16 2^-8): the folded weights, the convolution's
result and the output. The first is a share of each product, and so a larger one of a sum in which large products
cancel. Plain PyTorch on a GPU rounds twice, after the convolution and after the bias: sqrt(2 / 3) of this mean error.
"""


@dataclass(frozen=True, kw_only=True)
class UpsampleConvLaunch:
    """How the work is cut: a program takes `rows` x `columns` elements with `warps` x 32 threads.

    Columns are channels; rows are output channels of the weights, then positions in a line of the output.
    """

    rows: int
    columns: int
    warps: int


def upsample_conv_launch(channels: int) -> UpsampleConvLaunch:
    """The tile for C channels: 1024 elements, 8 a thread, so that the nine taps of each fit into its registers.

    64 columns divide the channels of SD, SDXL and their VAEs.
    """
    columns = min(64, 1 << max(channels - 1, 0).bit_length())
    return UpsampleConvLaunch(rows=1024 // columns, columns=columns, warps=4)


def upsample_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, launch: UpsampleConvLaunch | None = None
) -> Tensor:
    """Double a picture by repeating its pixels, and convolve it 3x3 with a border of zeros.

    Args:
        x: `[B, I, H, W]` in torch.channels_last.
        weight: `[O, I, 3, 3]` of the dtype of `x`, in torch.channels_last.
        bias: `[O]`, or None.
        launch: another tile than `upsample_conv_launch` chooses, for both kernels.

    Returns:
        `[B, O, 2H, 2W]` in torch.channels_last, of the dtype of `x`; the bias is added in fp32.

    Raises:
        NotSupportedError: with the reasons `upsample_conv_reasons` gives.
    """
    refuse(LIMITS, upsample_conv_misfits(x, weight, bias))
    tile = [] if launch is None else list(astuple(launch))
    # not bound to a name: the folded weights go before the output comes
    y = F.conv2d(x, _weight_op(weight, tile), padding=1)
    # which is no copy, but where an operator's stand-in (meta, a compiler's) does not know the layout of the result
    output: Tensor = _interleave_op(y.contiguous(memory_format=torch.channels_last), bias, tile)
    return output


def upsample_conv_plain(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`upsample_conv` in plain PyTorch, as diffusers' `Upsample2D` computes it.

    >>> upsample_conv_plain(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 3, 3))
    tensor([[[[4., 4.],
              [4., 4.]]]])
    """
    return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)


def upsample_conv_reasons(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, launch: UpsampleConvLaunch | None = None
) -> list[str]:
    """Why `upsample_conv` cannot take these arguments; empty when it can."""
    return device_reasons(LIMITS, x.device, x.dtype) + upsample_conv_misfits(x, weight, bias)


def upsample_conv_misfits(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, launch: UpsampleConvLaunch | None = None
) -> list[str]:
    """`upsample_conv_reasons` but for the device."""
    reasons = grad_reasons(LIMITS, x, weight, bias)
    if x.ndim != 4 or weight.ndim != 4 or weight.shape[1:] != (x.shape[1], 3, 3):
        return [
            *reasons,
            f"upsample_conv takes [B, I, H, W] and [O, I, 3, 3], not {list(x.shape)}, {list(weight.shape)}",
        ]
    reasons += _layout_reasons(x=x, weight=weight)
    if weight.dtype != x.dtype or weight.device != x.device:
        reasons.append(f"x is {x.dtype} on {x.device}, weight {weight.dtype} on {weight.device}")
    return reasons + vector_reasons(LIMITS, x, (weight.shape[0],), bias=bias)


KERNEL = Kernel(
    run=upsample_conv,
    plain=upsample_conv_plain,
    misfits=upsample_conv_misfits,
    reasons=upsample_conv_reasons,
    limits=LIMITS,
    tolerance=TOLERANCE,
)


def _layout_reasons(**tensors: Tensor) -> list[str]:
    named = tensors.items()
    return [f"the channels of {name} are not innermost in memory" for name, x in named if not channels_innermost(x)]


@torch.library.custom_op(
    "diffusers_turbo::upsample_conv_weight", mutates_args=(), schema="(Tensor weight, int[] launch) -> Tensor"
)
def _weight_op(weight: Tensor, launch: Sequence[int]) -> Tensor:
    """Fold `[O, I, 3, 3]` into `[4 * O, I, 2, 2]`."""
    refuse(LIMITS, device_reasons(LIMITS, weight.device, weight.dtype) + _layout_reasons(weight=weight))
    folded = _empty_folded(weight)
    if weight.numel() == 0:
        return folded
    outputs, channels = weight.shape[:2]
    tile = launch_from(UpsampleConvLaunch, launch) if launch else upsample_conv_launch(channels)
    grid = (-(-outputs // tile.rows), -(-channels // tile.columns))
    with on_device_of(weight):
        _upsample_conv_weight_kernel[grid](
            weight, folded, outputs, channels, ROWS=tile.rows, COLUMNS=tile.columns, num_warps=tile.warps
        )
    return folded


@_weight_op.register_fake
def _(weight: Tensor, launch: Sequence[int]) -> Tensor:
    return _empty_folded(weight)


def _empty_folded(weight: Tensor) -> Tensor:
    outputs, channels = weight.shape[:2]
    return weight.new_empty(4 * outputs, 2, 2, channels).movedim(-1, 1)


@torch.library.custom_op(
    "diffusers_turbo::upsample_conv_interleave",
    mutates_args=(),
    schema="(Tensor y, Tensor? bias, int[] launch) -> Tensor",
)
def _interleave_op(y: Tensor, bias: Tensor | None, launch: Sequence[int]) -> Tensor:
    """Interleave `[B, 4 * O, H + 1, W + 1]` to `[B, O, 2H, 2W]` and add the bias."""
    refuse(LIMITS, device_reasons(LIMITS, y.device, y.dtype) + _layout_reasons(y=y))
    output = _empty_interleaved(y)
    if output.numel() == 0:
        return output
    batch, channels, height, width = output.shape
    tile = launch_from(UpsampleConvLaunch, launch) if launch else upsample_conv_launch(channels)
    tiles = -(-width // tile.rows)
    grid = (batch * height * tiles, -(-channels // tile.columns))
    with on_device_of(y):
        _upsample_conv_interleave_kernel[grid](
            y,
            output,
            *optional(y, bias),
            height,
            width,
            tiles,
            channels,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            num_warps=tile.warps,
        )
    return output


@_interleave_op.register_fake
def _(y: Tensor, bias: Tensor | None, launch: Sequence[int]) -> Tensor:
    return _empty_interleaved(y)


def _empty_interleaved(y: Tensor) -> Tensor:
    batch, channels, height, width = y.shape
    return y.new_empty(batch, 2 * (height - 1), 2 * (width - 1), channels // 4).movedim(-1, 1)


@jit()
def _taps(weight: tl.tensor, channels: tl.tensor, present: tl.tensor) -> tuple[tl.tensor, ...]:
    """Load a row of three taps; return the two of even columns and the two of odd ones, in fp32."""
    first = tl.load(weight, mask=present, other=0).to(tl.float32)
    second = tl.load(weight + channels, mask=present, other=0).to(tl.float32)
    third = tl.load(weight + 2 * channels, mask=present, other=0).to(tl.float32)
    return first, second + third, first + second, third


@jit()
def _store_taps(
    folded: tl.tensor,
    plane: tl.tensor,
    channels: tl.tensor,
    even_left: tl.tensor,
    even_right: tl.tensor,
    odd_left: tl.tensor,
    odd_right: tl.tensor,
    present: tl.tensor,
) -> None:
    """Store a row of the kernel for even columns, and that of the one for odd columns, a plane further."""
    dtype = folded.dtype.element_ty
    tl.store(folded, even_left.to(dtype), mask=present)
    tl.store(folded + channels, even_right.to(dtype), mask=present)
    tl.store(folded + plane, odd_left.to(dtype), mask=present)
    tl.store(folded + plane + channels, odd_right.to(dtype), mask=present)


@jit("outputs")
def _upsample_conv_weight_kernel(
    weight: tl.tensor,
    folded: tl.tensor,
    outputs: tl.tensor,
    channels: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    # From [O, 3, 3, I] to [4, O, 2, 2, I]. The tile's first element in int64, within it int32 is enough.
    first = tl.program_id(0) * ROWS
    row = tl.arange(0, ROWS)[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    present = (first + row < outputs) & (column < channels)
    source = weight + first.to(tl.int64) * channels * 9 + (row * (channels * 9) + column)
    a0, b0, c0, d0 = _taps(source, channels, present)
    a1, b1, c1, d1 = _taps(source + 3 * channels, channels, present)
    a2, b2, c2, d2 = _taps(source + 6 * channels, channels, present)
    plane = outputs.to(tl.int64) * channels * 4
    even = folded + first.to(tl.int64) * channels * 4 + (row * (channels * 4) + column)
    odd = even + 2 * plane
    _store_taps(even, plane, channels, a0, b0, c0, d0, present)
    _store_taps(even + 2 * channels, plane, channels, a1 + a2, b1 + b2, c1 + c2, d1 + d2, present)
    _store_taps(odd, plane, channels, a0 + a1, b0 + b1, c0 + c1, d0 + d1, present)
    _store_taps(odd + 2 * channels, plane, channels, a2, b2, c2, d2, present)


@jit("has_bias", "height", "width", "tiles")
def _upsample_conv_interleave_kernel(
    y: tl.tensor,
    output: tl.tensor,
    bias: tl.tensor,
    has_bias: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    tiles: tl.tensor,
    channels: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    # From [B, H + 1, W + 1, 4, O] to [B, height, width, O], a piece of one line a program. The line's first element in
    # int64, since the tensors may pass 2^31 elements; within a line int32 is enough.
    line = tl.program_id(0) // tiles
    position = (tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = column < channels
    present = (position < width) & inside
    down = line % height
    above = line // height * (height // 2 + 1) + (down + 1) // 2
    source = y + above.to(tl.int64) * (width // 2 + 1) * channels * 4 + down % 2 * 2 * channels
    offset = (position + 1) // 2 * (channels * 4) + position % 2 * channels + column
    value = tl.load(source + offset, mask=present, other=0).to(tl.float32)
    value += tl.load(bias + column, mask=inside & (has_bias != 0), other=0).to(tl.float32)
    target = output + line.to(tl.int64) * width * channels
    tl.store(target + (position * channels + column), value.to(output.dtype.element_ty), mask=present)
