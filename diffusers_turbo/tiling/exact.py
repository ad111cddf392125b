"""A decode in tiles that is the untiled one up to rounding, for about twice the work.

Two things make tiles differ from the whole picture. A convolution sees zeros where the picture goes on: so each tile is
cut out with as many rows around it as its layers look far, and these are thrown away. A group norm sees a tile's
statistics in place of the picture's: so norms are settled one after the other, each from tiles that ran up to it with
those before it settled, counting every pixel once.

The decoder is cut into stretches, a residual block each, between which pictures are held whole: on the device, or in
host memory, and then only tiles are on the device. A tile is a strip as wide as the picture: its rows are one piece of
host memory where the channels of a pixel lie together.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from math import ceil
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .statistics import forwards, normed_by

REFERENCE_CHANNELS = 256
"""Tiles have the pixels that are asked for where there are so many channels, and fewer where there are more."""


class Picture(Protocol):
    """What a stretch begins or ends with, `[1, C, H, W]`."""

    @property
    def height(self) -> int:
        """Its rows."""

    @property
    def width(self) -> int:
        """Its columns."""

    def rows(self, first: int, last: int) -> Tensor:
        """Give rows `[1, C, last - first, W]` on the device."""

    def put(self, first: int, rows: Tensor) -> None:
        """Take rows from `first` on."""


def has_channels_last(rows: Tensor) -> bool:
    """Whether the channels of a pixel lie together, for rows of a picture `[1, C, H, W]`, which may be some of many."""
    return rows.stride(1) == 1


Hold = Callable[[Tensor, int], Picture]
"""Makes an empty picture of so many rows, else like the given ones."""


@dataclass(eq=False)
class OnDevice:
    """A picture that lies on the device."""

    whole: Tensor

    @classmethod
    def like(cls, rows: Tensor, height: int) -> OnDevice:
        """Make an empty one."""
        layout = torch.channels_last if has_channels_last(rows) else torch.contiguous_format
        size = (*rows.shape[:2], height, rows.shape[3])
        return cls(torch.empty(size, dtype=rows.dtype, device=rows.device, memory_format=layout))

    @property
    def height(self) -> int:
        """Its rows."""
        return self.whole.shape[2]

    @property
    def width(self) -> int:
        """Its columns."""
        return self.whole.shape[3]

    def rows(self, first: int, last: int) -> Tensor:
        """Give rows."""
        return self.whole[:, :, first:last]

    def put(self, first: int, rows: Tensor) -> None:
        """Take rows."""
        self.whole[:, :, first : first + rows.shape[2]] = rows


@dataclass(eq=False)
class OnHost:
    """A picture that lies in host memory, page-locked where copies are to be queued as kernels are.

    Attributes:
        memory: `[H, W, C]`; on the meta device there is none, so that what is on the device is seen alone.
        shape: of it.
        device, dtype: of the rows that are given.
        channels_last: whether they are given in that layout.
    """

    memory: Tensor | None
    shape: tuple[int, int, int]
    device: torch.device
    dtype: torch.dtype
    channels_last: bool

    @property
    def height(self) -> int:
        """Its rows."""
        return self.shape[0]

    @property
    def width(self) -> int:
        """Its columns."""
        return self.shape[1]

    def rows(self, first: int, last: int) -> Tensor:
        """Copy rows to the device."""
        if self.memory is None:
            there = torch.empty(last - first, *self.shape[1:], dtype=self.dtype, device=self.device)
        else:
            there = self.memory[first:last].to(self.device, non_blocking=True)
        rows = there.permute(2, 0, 1)[None]
        return rows if self.channels_last else rows.contiguous()

    def put(self, first: int, rows: Tensor) -> None:
        """Copy rows to the host."""
        there = rows[0].permute(1, 2, 0).contiguous()
        if self.memory is not None:
            self.memory[first : first + len(there)].copy_(there, non_blocking=True)


class _Measured(Exception):
    """A tile has run as far as it was to."""


@dataclass(eq=False)
class Settled:
    """One group norm, measured over the tiles of a picture and then applied with what was measured.

    Attributes:
        norm: the module.
        own: which rows of the next tile are its own.
        seen: for each tile how many pixels it has, and their mean and variance by channel.
        per_channel: mean, variance, weight and bias to apply.
    """

    norm: nn.GroupNorm
    own: slice = field(default_factory=lambda: slice(None))
    seen: list[tuple[int, Tensor, Tensor]] = field(default_factory=list)
    per_channel: list[Tensor] = field(default_factory=list)
    wide: torch.dtype = torch.float32

    def measure(self, input: Tensor) -> Tensor:
        """Take the statistics of the tile's own pixels, and stop."""
        self.wide = torch.promote_types(input.dtype, torch.float32)
        own = input[0, :, self.own].to(self.wide)
        variance, mean = torch.var_mean(own, dim=(1, 2), correction=0)
        pooled_in = torch.float32 if input.device.type == "mps" else torch.float64  # which MPS does not know
        self.seen.append((own[0].numel(), mean.to(pooled_in), variance.to(pooled_in)))
        raise _Measured

    def settle(self) -> None:
        """Pool what was seen, of all tiles and the channels of each group."""
        means = torch.stack([mean for _, mean, _ in self.seen])
        counts = means.new_tensor([count for count, _, _ in self.seen])
        shares = (counts / counts.sum())[:, None]
        variances = torch.stack([variance for _, _, variance in self.seen])
        mean = (shares * means).sum(0)
        variance = (shares * (variances + (means - mean).square())).sum(0)
        grouped = mean.view(self.norm.num_groups, -1)
        center = grouped.mean(1, keepdim=True)
        spread = variance.view_as(grouped).mean(1, keepdim=True) + (grouped - center).square().mean(1, keepdim=True)
        self.per_channel = [each.expand_as(grouped).flatten().to(self.wide) for each in (center, spread)]
        if self.norm.affine:
            self.per_channel += [part.to(mean.device, self.wide) for part in (self.norm.weight, self.norm.bias)]

    def apply(self, input: Tensor) -> Tensor:
        """Normalise `[1, C, ..]` by the pooled statistics."""
        return normed_by(self.per_channel, input, self.norm.eps)


@dataclass(frozen=True)
class Strip:
    """Rows of a picture from `top` to `bottom`, and from `first` to `last` with those that are looked at from there."""

    top: int
    bottom: int
    first: int
    last: int

    def own(self, scale: int) -> slice:
        """Where its own rows are in a result that has `scale` rows for one."""
        return slice((self.top - self.first) * scale, (self.bottom - self.first) * scale)


@dataclass(frozen=True)
class Stretch:
    """Layers between two pictures that are held whole.

    Attributes:
        layers: in the order in which they work.
        norms: their group norms in that order.
        channels: at most of any picture inside.
        scale: rows of the result for one of the source.
        reach: how many rows of the result above and below its own a tile needs.
    """

    layers: tuple[Any, ...]
    norms: tuple[nn.GroupNorm, ...]
    channels: int
    scale: int
    reach: int

    def __call__(self, x: Tensor) -> Tensor:
        """Run it over rows, or a whole picture."""
        for layer in self.layers:
            x = layer(x, None) if hasattr(layer, "norm1") else layer(x)
        return x

    def in_tiles(self, source: Picture, tile: int, hold: Hold) -> Picture:
        """Run it over a picture in tiles of `tile` x `tile` pixels of the result, or as many in another shape."""
        strips = self.strips(source.height, source.width, tile)
        if len(strips) == 1:
            return OnDevice(self(source.rows(0, source.height)))
        settled = [Settled(norm) for norm in self.norms]
        for index, each in enumerate(settled):
            known: dict[nn.Module, Any] = {before.norm: before.apply for before in settled[:index]}
            with forwards({**known, each.norm: each.measure}):
                for strip in strips:
                    each.own = strip.own(self.scale)
                    with suppress(_Measured):
                        self(source.rows(strip.first, strip.last))
            each.settle()
        result: Picture | None = None
        with forwards({each.norm: each.apply for each in settled}):
            for strip in strips:
                rows = self(source.rows(strip.first, strip.last))[:, :, strip.own(self.scale)]
                if result is None:
                    result = hold(rows, source.height * self.scale)
                result.put(strip.top * self.scale, rows)
                del rows
        assert result is not None
        return result

    def strips(self, height: int, width: int, tile: int) -> list[Strip]:
        """Cut a source into even strips."""
        area = tile**2 * REFERENCE_CHANNELS / max(self.channels, REFERENCE_CHANNELS)
        most = max(1, int(area / (width * self.scale**2)))
        count = ceil(height / most)
        borders = [height * index // count for index in range(count + 1)]
        around = ceil(self.reach / self.scale)
        return [
            Strip(top, bottom, max(0, top - around), min(height, bottom + around)) for top, bottom in pairwise(borders)
        ]


def refusal_of(decoder: Any) -> str:
    """Say why a decoder cannot be cut into stretches; empty where it can."""
    from diffusers.models.resnet import ResnetBlock2D, Upsample2D
    from diffusers.models.unets.unet_2d_blocks import UpDecoderBlock2D

    if not all(hasattr(decoder, name) for name in ("conv_in", "mid_block", "up_blocks", "conv_norm_out", "conv_out")):
        return f"a {type(decoder).__name__}"
    for block in decoder.up_blocks:
        if type(block) is not UpDecoderBlock2D:
            return f"a {type(block).__name__}"
        for layer in (*block.resnets, *(block.upsamplers or ())):
            if type(layer) not in (ResnetBlock2D, Upsample2D):
                return f"a {type(layer).__name__}"
            if isinstance(layer, ResnetBlock2D) and type(layer.norm1) is not nn.GroupNorm:
                return f"residual blocks with {type(layer.norm1).__name__}"
    return "" if type(decoder.conv_norm_out) is nn.GroupNorm else f"a {type(decoder.conv_norm_out).__name__}"


def stretches_of(decoder: Any) -> list[Stretch]:
    """Cut what comes after a decoder's middle into stretches: a residual block, and an upsampling before it.

    An upsampled picture is not held, for it is the largest there is. A 3x3 convolution looks one pixel far, a residual
    block has two of them.
    """
    found: list[Stretch] = []
    upsampler: Any = None
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            found.append(
                Stretch(
                    layers=(resnet,) if upsampler is None else (upsampler, resnet),
                    norms=(resnet.norm1, resnet.norm2),
                    channels=max(resnet.in_channels, resnet.out_channels),
                    scale=1 if upsampler is None else 2,
                    reach=2 if upsampler is None else 3,
                )
            )
            upsampler = None
        upsampler = block.upsamplers[0] if block.upsamplers else None
    norm: nn.GroupNorm = decoder.conv_norm_out
    last = (norm, decoder.conv_act, decoder.conv_out)
    return [*found, Stretch(layers=last, norms=(norm,), channels=norm.num_channels, scale=1, reach=1)]


def tiled_layers(half: Any) -> list[nn.Module]:
    """Return the modules of a decoder that are called tile after tile; none of what cannot be cut into stretches."""
    layers = [] if refusal_of(half) else [layer for stretch in stretches_of(half) for layer in stretch.layers]
    return [layer for layer in layers if not isinstance(layer, nn.GroupNorm)]


def largest_held(decoder: Any, z: Tensor) -> int:
    """Return the bytes of the largest picture between stretches, for latents `[1, C, h, w]`."""
    scale = most = 1
    for stretch in stretches_of(decoder)[:-1]:
        scale *= stretch.scale
        most = max(most, scale**2 * stretch.layers[-1].out_channels)
    return most * z[0, 0].nbytes


def decode_in_tiles(decoder: Any, z: Tensor, tile: int, hold: Hold = OnDevice.like) -> Tensor:
    """Decode `[1, C, h, w]` to a picture `[1, 3, H, W]`, the untiled one up to rounding.

    Args:
        decoder: of an AutoencoderKL.
        z: latents, past the convolution after quantisation.
        tile: side of a square in pixels of which a tile has as many, where the decoder has 256 channels.
        hold: makes the pictures between stretches.
    """
    picture: Picture = OnDevice(decoder.mid_block(decoder.conv_in(z), None))
    *stretches, last = stretches_of(decoder)
    for stretch in stretches:
        picture = stretch.in_tiles(picture, tile, hold)
    whole = last.in_tiles(picture, tile, OnDevice.like)
    return whole.rows(0, whole.height)
