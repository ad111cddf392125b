"""Tiles into one canvas: what is held is the canvas, one row of tiles in float32, and what one tile needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .grid import Axis


@dataclass(frozen=True)
class Grid:
    """Tiles over a picture.

    Attributes:
        rows, columns: the two axes, in latents.
        reads, writes: side of one latent in the source and in the result, in pixels or, for latents, 1.
    """

    rows: Axis
    columns: Axis
    reads: int
    writes: int

    def tiles(self, source: Tensor) -> Iterator[Tensor]:
        """Cut `[B, C, H, W]` into the tiles, row by row."""
        for top, bottom, _ in self.rows.spans():
            for left, right, _ in self.columns.spans():
                yield self._cut(source, top, bottom, left, right)

    def paint(self, run: Callable[[Tensor], Tensor], source: Tensor) -> Tensor:
        """Run every tile of `source` `[B, C, H, W]` and blend the results into one canvas of their dtype."""
        tiles = map(run, self.tiles(source))
        across: list[Tensor] = []
        down: list[Tensor] = []
        canvas = row = source
        for index, (top, bottom, following) in enumerate(self.rows.spans()):
            for position, (left, right, _) in enumerate(self.columns.spans()):
                tile = next(tiles)
                if not across:
                    wide = torch.promote_types(tile.dtype, torch.float32)
                    across, down = (
                        [feather.to(tile.device, wide) for feather in axis.feathers(self.writes)]
                        for axis in (self.columns, self.rows)
                    )
                    width = self.columns.length * self.writes
                    canvas = tile.new_empty(*tile.shape[:2], self.rows.length * self.writes, width)
                    row = tile.new_zeros(*tile.shape[:3], width, dtype=wide)
                place = slice(left * self.writes, right * self.writes)
                row[..., place] += tile * (down[index][:, None] * across[position])
                del tile
            # what the next row of tiles does not reach is finished; the rest is its beginning
            finished = (following - top) * self.writes
            canvas[:, :, top * self.writes : following * self.writes] = row[:, :, :finished]
            if following < bottom:
                row = torch.cat((row[:, :, finished:], torch.zeros_like(row[:, :, :finished])), dim=2)
            else:
                row.zero_()
        return canvas

    def _cut(self, source: Tensor, top: int, bottom: int, left: int, right: int) -> Tensor:
        reads = self.reads
        return source[:, :, top * reads : bottom * reads, left * reads : right * reads]
