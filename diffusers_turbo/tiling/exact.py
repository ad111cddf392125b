"""A decode in tiles that is the untiled one up to rounding, at the price of running each tile once for every norm.

Two things make tiles differ from the whole picture. A convolution sees zeros where the picture goes on: so each tile is
cut out with as many pixels around it as its layers look far, and these are thrown away. A group norm sees a tile's
statistics in place of the picture's: so norms are settled one after the other, each from tiles that ran up to it with
those before it settled, counting every pixel once.

The decoder is cut into stretches between pictures that are held whole: before each doubling of the resolution, where
they are small. Within a stretch only tiles are there.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field, replace
from math import ceil, sqrt
from typing import Any

import torch
from torch import Tensor, nn

from .statistics import forwards, normed_by

REFERENCE_CHANNELS = 256
"""Tiles have the side that is asked for where there are so many channels, and a smaller one where there are more."""


class _Measured(Exception):
    """A tile has run as far as it was to."""


@dataclass(eq=False)
class Settled:
    """One group norm, measured over the tiles of a picture and then applied with what was measured."""

    norm: nn.GroupNorm
    core: tuple[slice, slice] = (slice(None), slice(None))
    seen: list[tuple[int, Tensor, Tensor]] = field(default_factory=list)
    per_channel: list[Tensor] = field(default_factory=list)
    wide: torch.dtype = torch.float32

    def measure(self, input: Tensor) -> Tensor:
        """Take the statistics of the tile's own pixels, and stop."""
        self.wide = torch.promote_types(input.dtype, torch.float32)
        own = input[0, :, self.core[0], self.core[1]].to(self.wide)
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
class Stretch:
    """Layers between two pictures that are held whole.

    Attributes:
        layers: in the order in which they work.
        norms: their group norms in that order.
        scale: pixels of the result for one of the source, a side.
        reach: how many pixels of the result around its own a tile needs.
        channels: at most of any picture inside.
    """

    layers: tuple[Any, ...]
    norms: tuple[nn.GroupNorm, ...]
    scale: int
    reach: int
    channels: int

    def __call__(self, x: Tensor) -> Tensor:
        """Run it whole."""
        for layer in self.layers:
            x = layer(x, None) if hasattr(layer, "norm1") else layer(x)
        return x

    def in_tiles(self, source: Tensor, side: int) -> Tensor:
        """Run it over `[1, C, H, W]` in tiles of `side` pixels of the result."""
        step = max(1, side // self.scale)
        height, width = source.shape[2:]
        if max(height, width) <= step:
            return self(source)
        places = [
            (top, min(top + step, height), left, min(left + step, width))
            for top in range(0, height, step)
            for left in range(0, width, step)
        ]
        settled = [Settled(norm) for norm in self.norms]
        for index, each in enumerate(settled):
            known: dict[nn.Module, Any] = {before.norm: before.apply for before in settled[:index]}
            with forwards({**known, each.norm: each.measure}):
                for place in places:
                    tile, each.core = self._cut(source, *place)
                    with suppress(_Measured):
                        self(tile)
            each.settle()
        result: Tensor | None = None
        with forwards({each.norm: each.apply for each in settled}):
            for top, bottom, left, right in places:
                tile, core = self._cut(source, top, bottom, left, right)
                painted = self(tile)[:, :, core[0], core[1]]
                if result is None:
                    result = painted.new_empty(1, painted.shape[1], height * self.scale, width * self.scale)
                result[:, :, top * self.scale : bottom * self.scale, left * self.scale : right * self.scale] = painted
                del painted
        assert result is not None
        return result

    def _cut(self, source: Tensor, top: int, bottom: int, left: int, right: int) -> tuple[Tensor, tuple[slice, slice]]:
        halo = ceil(self.reach / self.scale)
        first, start = max(0, top - halo), max(0, left - halo)
        tile = source[:, :, first : bottom + halo, start : right + halo]
        rows = slice((top - first) * self.scale, (bottom - first) * self.scale)
        columns = slice((left - start) * self.scale, (right - start) * self.scale)
        return tile, (rows, columns)


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
    """Cut what comes after a decoder's middle into stretches: an upsampling, and the residual blocks after it.

    A 3x3 convolution looks one pixel far, a residual block has two of them.
    """
    found: list[Stretch] = []
    upsampler: Any = None
    for block in decoder.up_blocks:
        resnets = list(block.resnets)
        layers = resnets if upsampler is None else [upsampler, *resnets]
        found.append(
            Stretch(
                layers=tuple(layers),
                norms=tuple(norm for resnet in resnets for norm in (resnet.norm1, resnet.norm2)),
                scale=1 if upsampler is None else 2,
                reach=2 * len(resnets) + (upsampler is not None),
                channels=max(max(resnet.in_channels, resnet.out_channels) for resnet in resnets),
            )
        )
        upsampler = block.upsamplers[0] if block.upsamplers else None
    last = found.pop()
    ends = (decoder.conv_norm_out, decoder.conv_act, decoder.conv_out)
    return [
        *found,
        replace(last, layers=last.layers + ends, norms=(*last.norms, decoder.conv_norm_out), reach=last.reach + 1),
    ]


def decode_in_tiles(decoder: Any, z: Tensor, tile: int) -> Tensor:
    """Decode `[1, C, h, w]` to a picture `[1, 3, H, W]`, the untiled one up to rounding, in tiles of `tile` pixels."""
    x: Tensor = decoder.mid_block(decoder.conv_in(z), None)
    for stretch in stretches_of(decoder):
        side = int(tile * sqrt(REFERENCE_CHANNELS / max(stretch.channels, REFERENCE_CHANNELS))) // 8 * 8
        x = stretch.in_tiles(x, max(8, side))
    return x
