"""GroupNorm with optional SiLU on channels-last activations, without a layout copy, an embedding and a bias on the way.

In memory the input is `[B, S, C]`, S positions of C channels, and a group a narrow stripe of it. Two ways lead to its
statistics, and `group_norm_launch` says when which:

- single: one program a group takes the statistics and normalises. It holds small groups in registers, and reads larger
  ones again from cache.
- split: programs take tiles of whole positions and store mean and squared deviations of each channel; a finishing
  launch merges them by group; a third normalises. For the few, huge groups of a VAE and the top of a UNet.

What is not held is read once for its statistics, by Welford's update down the rows of a tile, one accumulator a slot,
and slots are merged around their common mean (Chan, Golub, LeVeque: https://doi.org/10.1080/00031305.1983.10483115).
The sum of squares, which cancels when the mean is large beside the deviation, is never formed; and Welford needs one
reading of memory where two passes need two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

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
from .group_norm_device import apply_kernel, finish_kernel, held_kernel, partial_kernel, single_kernel

LIMITS = KernelLimits(kernel="group_norm", layout="[B, C, ..] with channels innermost (torch.channels_last)")

TOLERANCE = rounded_once(2e-6)  # for statistics in fp32

HELD_SLOTS = (4096, 8192, 16384)
"""Elements of a group that one program holds, 32 a thread."""

SINGLE_SLOTS = 32768
"""Largest group, in elements, that one program takes alone: four turns of `block`. Twice as many from `WIDE` on."""

WIDE = 40
"""Channels a group with which one program is the faster way up to eight turns: it reads longer pieces of memory."""

MOST_TILES = 1024
"""Most tiles a channel is split into: enough programs for any GPU, while a finishing program still reads the tiles of a
group (4 channels x 1024 tiles in a VAE) in two turns of `finish_block`."""


@dataclass(frozen=True, kw_only=True)
class GroupNormLaunch:
    """How the work is cut.

    Attributes:
        split: take the statistics by tiles, see the module.
        held: a single group's program reads it once, if `block` is as large as the group.
        block, warps: elements that a single group's program holds at once, and its threads over 32. A group with more
            channels than `block` is split.
        rows, columns: positions and channels that a tile's program holds at once.
        tile_rows: positions of a tile; a multiple of `rows` wastes nothing.
        tile_warps: threads of a tile's program over 32.
        finish_block, finish_warps: partial results that a finishing program holds at once, and its threads over 32.
    """

    split: bool
    held: bool = False
    block: int = 8192
    warps: int = 32
    rows: int = 32
    columns: int = 64
    tile_rows: int = 64
    tile_warps: int = 4
    finish_block: int = 2048
    finish_warps: int = 8


def group_norm_launch(channels: int, positions: int, num_groups: int) -> GroupNormLaunch:
    """The rule: a group up to `SINGLE_SLOTS` elements is one program's; larger ones are split into at most 1024 tiles.

    What is not held is read 8192 elements at a time, 8 a thread, two accumulators each. A tile is 64
    channels wide, a cache line of 16-bit values that divides every channel count of SD and SDXL, and 64 positions
    long, which keeps its partial results at a sixteenth of what it reads (16-bit) and makes 640 programs of SD1.5's
    smallest split norm; it grows where that would be more than 1024 tiles. The batch plays no part in the choice, so
    an image's bits do not depend on how many are made beside it.

    >>> group_norm_launch(1280, 16 * 16, 32).split, group_norm_launch(128, 512 * 512, 32).tile_rows
    (False, 256)
    """
    columns = min(64, 1 << max(channels - 1, 0).bit_length())
    tile_rows = max(64, 32 * -(-positions // (32 * MOST_TILES)))
    width = channels // max(num_groups, 1)
    slots = positions * width
    for block in HELD_SLOTS:
        if slots <= block:
            warps = block // 1024
            return GroupNormLaunch(
                split=False, held=True, block=block, warps=warps, columns=columns, tile_rows=tile_rows
            )
    largest = 2 * SINGLE_SLOTS if width >= WIDE else SINGLE_SLOTS
    return GroupNormLaunch(split=slots > largest, columns=columns, tile_rows=tile_rows)


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    silu: bool = False,
    add: Tensor | None = None,
    before: Tensor | None = None,
    launch: GroupNormLaunch | None = None,
) -> Tensor:
    """Normalise each group of channels of each sample, in the memory layout the input has.

    Args:
        x: `[B, C, H, W]` in torch.channels_last, or any `[B, C, ..]` with channels innermost in memory.
        num_groups: C is a multiple of it.
        weight, bias: `[C]`, or None.
        eps: added to the variance.
        silu: apply SiLU to the result.
        add: `[B, C]` added to every position before the norm: a resnet's time embedding. Its rows may lie anywhere
            (stripes of a wider tensor, or one row for all). Added in fp32, and the sum is not rounded in between.
        before: `[C]` added likewise: the bias of the convolution that made `x`, called without it.
        launch: another way or tile than `group_norm_launch` chooses.

    Returns:
        Shape, dtype and strides of `x`; computed in fp32 and rounded once.

    Raises:
        NotSupportedError: with the reasons `group_norm_reasons` gives.
    """
    refuse(LIMITS, grad_reasons(LIMITS, x, weight, bias, add, before))
    output: Tensor = _op(
        x, num_groups, weight, bias, eps, silu, add, before, [] if launch is None else list(astuple(launch))
    )
    return output


def group_norm_plain(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    silu: bool = False,
    add: Tensor | None = None,
    before: Tensor | None = None,
) -> Tensor:
    """`group_norm` in plain PyTorch, as a diffusers resnet computes it; the layout of its result is PyTorch's choice.

    >>> group_norm_plain(torch.tensor([[[1.0, 3.0]]]), 1, eps=0.0, add=torch.tensor([[5.0]]))
    tensor([[[-1.,  1.]]])
    """
    ones = (1,) * (x.ndim - 2)
    if before is not None:
        x = x + before.reshape(-1, *ones)
    if add is not None:
        x = x + add.reshape(*add.shape, *ones)
    output = F.group_norm(x, num_groups, weight, bias, eps)
    return F.silu(output) if silu else output


def group_norm_reasons(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    silu: bool = False,
    add: Tensor | None = None,
    before: Tensor | None = None,
    launch: GroupNormLaunch | None = None,
) -> list[str]:
    """Why `group_norm` cannot take these arguments; empty when it can."""
    misfits = group_norm_misfits(x, num_groups, weight, bias, eps, add=add, before=before)
    return device_reasons(LIMITS, x.device, x.dtype) + misfits


def group_norm_misfits(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    silu: bool = False,
    add: Tensor | None = None,
    before: Tensor | None = None,
    launch: GroupNormLaunch | None = None,
) -> list[str]:
    """`group_norm_reasons` but for the device."""
    reasons = grad_reasons(LIMITS, x, weight, bias, add, before)
    if x.ndim < 2:
        return [*reasons, f"group_norm takes [B, C, ..], the shape is {list(x.shape)}"]
    batch, channels = x.shape[:2]
    if not channels_innermost(x):
        reasons.append("channels are not innermost in memory: x.to(memory_format=torch.channels_last) would copy")
    if num_groups < 1 or channels % num_groups:
        reasons.append(f"{channels} channels do not divide into {num_groups} groups")
    reasons += vector_reasons(LIMITS, x, (channels,), weight=weight, bias=bias, before=before)
    return reasons + vector_reasons(LIMITS, x, (batch, channels), rows_anywhere=True, add=add)


KERNEL = Kernel(
    run=group_norm,
    plain=group_norm_plain,
    misfits=group_norm_misfits,
    reasons=group_norm_reasons,
    limits=LIMITS,
    tolerance=TOLERANCE,
)

_SCHEMA = (
    "(Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps, bool silu, Tensor? add, Tensor? before,"
    " int[] launch) -> Tensor"
)


@torch.library.custom_op("diffusers_turbo::group_norm", mutates_args=(), schema=_SCHEMA)
def _op(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    silu: bool,
    add: Tensor | None,
    before: Tensor | None,
    launch: Sequence[int],
) -> Tensor:
    refuse(LIMITS, group_norm_reasons(x, num_groups, weight, bias, eps, add=add, before=before))
    output = torch.empty_like(x)
    if x.numel() == 0:
        return output
    norm = _Norm(x, output, num_groups, weight, bias, eps, silu, add, before)
    cut = (
        launch_from(GroupNormLaunch, launch) if launch else group_norm_launch(norm.channels, norm.positions, num_groups)
    )
    with on_device_of(x):
        (_run_split if cut.split or norm.width > cut.block else _run_single)(norm, cut)
    return output


@dataclass(frozen=True)
class _Norm:
    """One call, checked, on its way to the device."""

    x: Tensor
    output: Tensor
    num_groups: int
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    silu: bool
    add: Tensor | None
    before: Tensor | None

    @property
    def batch(self) -> int:
        return self.x.shape[0]

    @property
    def channels(self) -> int:
        return self.x.shape[1]

    @property
    def width(self) -> int:
        """Channels of a group."""
        return self.channels // self.num_groups

    @property
    def add_row(self) -> int:
        """Elements between the rows of `add`."""
        return 0 if self.add is None else self.add.stride(0)

    @property
    def positions(self) -> int:
        return self.x.numel() // (self.batch * self.channels)


@_op.register_fake
def _(x: Tensor, *options: object) -> Tensor:
    return torch.empty_like(x)


def _run_single(norm: _Norm, cut: GroupNormLaunch) -> None:
    held = cut.held and norm.positions * norm.width <= cut.block
    (held_kernel if held else single_kernel)[(norm.batch * norm.num_groups,)](
        norm.x,
        norm.output,
        *optional(norm.x, norm.weight, norm.bias, norm.add, norm.before),
        norm.add_row,
        int(norm.silu),
        norm.positions,
        norm.channels,
        norm.eps,
        GROUP=norm.width,
        BLOCK=cut.block,
        num_warps=cut.warps,
    )


def _run_split(norm: _Norm, cut: GroupNormLaunch) -> None:
    x, batch, channels, positions = norm.x, norm.batch, norm.channels, norm.positions
    tiles, column_tiles = -(-positions // cut.tile_rows), -(-channels // cut.columns)
    tile = {"ROWS": cut.rows, "COLUMNS": cut.columns, "num_warps": cut.tile_warps}

    partial = x.new_empty(2, batch, tiles, channels, dtype=torch.float32)
    partial_kernel[(batch * tiles, column_tiles)](x, *partial, positions, channels, tiles, cut.tile_rows, **tile)

    scale = x.new_empty(2, batch, channels, dtype=torch.float32)
    finish_kernel[(batch * norm.num_groups,)](
        *partial,
        *scale,
        *optional(x, norm.weight, norm.add, norm.before),
        norm.add_row,
        positions,
        channels,
        norm.num_groups,
        tiles,
        cut.tile_rows,
        norm.eps,
        BLOCK=cut.finish_block,
        num_warps=cut.finish_warps,
    )

    tiles = -(-positions // cut.rows)
    apply_kernel[(batch * tiles, column_tiles)](
        x,
        norm.output,
        *scale,
        *optional(x, norm.bias),
        int(norm.silu),
        positions,
        channels,
        tiles,
        **tile,
    )
