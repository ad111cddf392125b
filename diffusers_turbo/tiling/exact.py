"""Layers over tiles, with the result of the whole picture up to rounding.

Two things make tiles differ from the whole picture. A convolution sees zeros where the picture goes on: so each tile is
cut out with as many rows around it as its layers look far, and these are thrown away. A group norm sees a tile's
statistics in place of the picture's: so norms are settled one after the other, each from tiles that ran up to it with
those before it settled, counting every pixel once.

A tile is a strip as wide as the picture: its rows are one piece of host memory where the channels of a pixel lie
together.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from .pictures import Hold, OnDevice, Picture, Seen
from .statistics import forwards, moments, normed_by

REFERENCE_CHANNELS = 256
"""Tiles have the pixels that are asked for where there are so many channels, and fewer where there are more."""


class _Measured(Exception):
    """A tile has run as far as it was to."""


def seen_of(rows: Tensor) -> Seen:
    """Measure rows `[1, C, h, W]`."""
    return Seen(rows[0, 0].numel(), *moments(rows))


@dataclass(eq=False)
class Settled:
    """One group norm, measured over the tiles of a picture and then applied with what was measured.

    Attributes:
        norm: the module.
        own: which rows of the next tile are its own.
        seen: what is known of each tile's own pixels.
        per_channel: mean, variance, weight and bias to apply.
    """

    norm: nn.GroupNorm
    own: slice = field(default_factory=lambda: slice(None))
    seen: list[Seen] = field(default_factory=list)
    per_channel: list[Tensor] = field(default_factory=list)

    def measure(self, input: Tensor) -> Tensor:
        """Take the statistics of the tile's own pixels, and stop."""
        self.seen.append(seen_of(input[:, :, self.own]))
        raise _Measured

    def settle(self) -> None:
        """Pool what was seen, of all tiles and the channels of each group."""
        means, variances = (torch.stack(each) for each in zip(*(found[1:] for found in self.seen), strict=True))
        wide = means.dtype
        if means.device.type != "mps":  # which does not know it
            means, variances = means.double(), variances.double()
        counts = means.new_tensor([found.pixels for found in self.seen])
        shares = (counts / counts.sum())[:, None]
        mean = (shares * means).sum(0)
        variance = (shares * (variances + (means - mean).square())).sum(0)
        grouped = mean.view(self.norm.num_groups, -1)
        center = grouped.mean(1, keepdim=True)
        spread = variance.view_as(grouped).mean(1, keepdim=True) + (grouped - center).square().mean(1, keepdim=True)
        self.per_channel = [each.expand_as(grouped).flatten().to(wide) for each in (center, spread)]
        if self.norm.affine:
            self.per_channel += [part.to(mean.device, wide) for part in (self.norm.weight, self.norm.bias)]

    def apply(self, input: Tensor) -> Tensor:
        """Normalise `[1, C, ..]` by the pooled statistics."""
        return normed_by(self.per_channel, input, self.norm.eps)


@dataclass(frozen=True)
class Strip:
    """Steps of rows from `top` to `bottom`, and from `first` to `last` with those that are looked at from there."""

    top: int
    bottom: int
    first: int
    last: int

    def own(self, rows: int) -> slice:
        """Where its own rows are in a result that has so many rows a step."""
        return slice((self.top - self.first) * rows, (self.bottom - self.first) * rows)


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """Layers between two pictures that are held whole.

    Attributes:
        layers: in the order in which they work.
        norms: their group norms in that order.
        channels: at most of any picture inside.
        reach: how many rows of the result above and below its own a tile needs.
        down, up: `up` rows of the result come from `down` rows of the source, which are a step.
    """

    layers: tuple[Any, ...]
    norms: tuple[nn.GroupNorm, ...]
    channels: int
    reach: int
    down: int = 1
    up: int = 1

    def __call__(self, x: Tensor) -> Tensor:
        """Run it over rows, or a whole picture."""
        for layer in self.layers:
            x = layer(x, None) if hasattr(layer, "norm1") else layer(x)
        return x

    @property
    def begins_with_norm(self) -> bool:
        """Whether its first norm is given the source as it is."""
        return bool(self.norms) and getattr(self.layers[0], "norm1", self.layers[0]) is self.norms[0]

    def in_tiles(self, source: Picture, tile: int, hold: Hold, *, measured: bool = False) -> Picture:
        """Run it over a picture in tiles of `tile` x `tile` pixels, or as many in another shape.

        Args:
            source: the picture.
            tile: side of a square of as many pixels.
            hold: makes the result.
            measured: whether to take the result's statistics as it is made, for a norm that is next.
        """
        strips = self.strips(source.height, source.width, tile)
        if len(strips) == 1:
            return OnDevice(self(source.rows(0, source.height)))

        def run(strip: Strip) -> Tensor:
            return self(source.rows(strip.first * self.down, strip.last * self.down))

        settled = [Settled(norm) for norm in self.norms]
        if self.begins_with_norm:
            settled[0].seen = list(source.seen)
        for index, each in enumerate(settled):
            if not each.seen:
                known: dict[nn.Module, Any] = {before.norm: before.apply for before in settled[:index]}
                with forwards({**known, each.norm: each.measure}):
                    for strip in strips:
                        # before a layer that halves the picture there is no norm
                        each.own = strip.own(self.up)
                        with suppress(_Measured):
                            run(strip)
            each.settle()
        result: Picture | None = None
        with forwards({each.norm: each.apply for each in settled}):
            for strip in strips:
                rows = run(strip)[:, :, strip.own(self.up)]
                if result is None:
                    result = hold(rows, strips[-1].bottom * self.up)
                result.put(strip.top * self.up, rows)
                if measured:
                    result.seen.append(seen_of(rows))
                del rows
        assert result is not None
        return result

    def strips(self, height: int, width: int, tile: int) -> list[Strip]:
        """Cut a source into even strips; one, where its rows are no whole steps."""
        steps, odd = divmod(height, self.down)
        area = tile**2 * REFERENCE_CHANNELS / max(self.channels, REFERENCE_CHANNELS)
        most = max(1, int(area / (width * max(self.down, self.up**2 / self.down))))
        count = 1 if odd else ceil(steps / most)
        borders = [steps * index // count for index in range(count + 1)]
        around = ceil(self.reach / self.up)
        return [
            Strip(top, bottom, max(0, top - around), min(steps, bottom + around)) for top, bottom in pairwise(borders)
        ]
