"""Where tiles lie along one axis, and what each weighs there."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CONTEXT = 0.25
"""Share of an overlap, at either end, that is decoded as context and not shown: next to its border a tile sees zeros
where the picture goes on. On the emoji model 0.06 to 0.12 dB nearer than none (docs/decisions/tiling.md)."""


@dataclass(frozen=True)
class Axis:
    """Tiles of one size along an axis, in latents: the fewest that cover it and overlap enough, evenly spread.

    There is no thin last tile: where the tiles do not divide the axis, they overlap more.

    >>> Axis(length=40, tile=16, overlap=4).starts
    (0, 12, 24)
    >>> Axis(length=41, tile=16, overlap=4).starts
    (0, 8, 17, 25)
    >>> Axis(length=10, tile=16, overlap=4).starts
    (0,)
    """

    length: int
    tile: int
    overlap: int

    @property
    def side(self) -> int:
        """Latents of every tile."""
        return min(self.tile, self.length)

    @property
    def starts(self) -> tuple[int, ...]:
        """First latent of each tile."""
        room = self.length - self.side
        gaps = math.ceil(room / (self.tile - self.overlap))
        return tuple((2 * room * index + gaps) // (2 * gaps) for index in range(gaps + 1)) if gaps else (0,)

    def spans(self) -> Iterator[tuple[int, int, int]]:
        """Yield each tile's first latent, the one after its last, and where the next tile begins (the axis ends)."""
        starts = self.starts
        for start, following in zip(starts, (*starts[1:], self.length), strict=True):
            yield start, start + self.side, following

    def feathers(self, scale: int) -> list[Tensor]:
        """Return the weights `[side * scale]` of each tile, `scale` pixels a latent; everywhere they sum to one.

        Raised cosines over what neighbours share: no edge at either end, which a linear ramp has at both.
        """
        starts, side = self.starts, self.side * scale
        inside = torch.arange(side, dtype=torch.float64) + 0.5
        feathers = []
        for index, start in enumerate(starts):
            weight = torch.ones(side, dtype=torch.float64)
            if index:
                weight *= _rise(inside, (starts[index - 1] + self.side - start) * scale)
            if index + 1 < len(starts):
                weight *= _rise(side - inside, (start + self.side - starts[index + 1]) * scale)
            feathers.append(weight)
        total = torch.zeros(self.length * scale, dtype=torch.float64)
        places = [slice(start * scale, start * scale + side) for start in starts]
        for place, weight in zip(places, feathers, strict=True):
            total[place] += weight
        return [(weight / total[place]).float() for place, weight in zip(places, feathers, strict=True)]


def _rise(distance: Tensor, width: int) -> Tensor:
    """From 0 at the tile's edge to 1 at `width` pixels from it, in the middle of them."""
    if not width:
        return torch.ones_like(distance)
    part = (distance / width - CONTEXT) / (1 - 2 * CONTEXT)
    return 0.5 - 0.5 * torch.cos(math.pi * part.clamp(0, 1))
