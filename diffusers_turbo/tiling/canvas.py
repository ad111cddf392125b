"""Tiles into one canvas: what is held is the canvas, one row of tiles in float32, and what one tile needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .grid import Axis


@dataclass(eq=False)
class Canvas:
    """The picture that is painted, the row of tiles that is worked on, and how its tiles are blended.

    Attributes:
        picture: `[B, C, H, W]`.
        row: `[B, C, tile, W]`, in float32 at least.
        across, down: weights of each tile's columns and rows.
    """

    picture: Tensor
    row: Tensor
    across: list[Tensor]
    down: list[Tensor]

    def takes(self, tile: Tensor) -> bool:
        """Whether a tile has its batch, channels and dtype."""
        return tile.dtype == self.picture.dtype and tile.shape[:2] == self.picture.shape[:2]


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

    def paint(self, run: Callable[[Tensor], Tensor], source: Tensor, into: Canvas | None = None) -> Tensor:
        """Run every tile of `source` `[B, C, H, W]` and blend the results into one canvas of their dtype.

        `into` is taken if it has their channels and dtype.
        """
        tiles = map(run, self.tiles(source))
        for index, (top, bottom, following) in enumerate(self.rows.spans()):
            for position, (left, right, _) in enumerate(self.columns.spans()):
                tile = next(tiles)
                if into is None or not into.takes(tile):
                    into = self.canvas(tile, tile.shape[1])
                place = slice(left * self.writes, right * self.writes)
                into.row[..., place] += tile * (into.down[index][:, None] * into.across[position])
                del tile
            assert into is not None
            # what the next row of tiles does not reach is finished; the rest is its beginning
            finished = (following - top) * self.writes
            into.picture[:, :, top * self.writes : following * self.writes] = into.row[:, :, :finished]
            if following < bottom:
                into.row = torch.cat((into.row[:, :, finished:], torch.zeros_like(into.row[:, :, :finished])), dim=2)
            else:
                into.row.zero_()
        assert into is not None
        return into.picture

    def canvas(self, like: Tensor, channels: int, dtype: torch.dtype | None = None) -> Canvas:
        """Make what tiles are painted into, for a batch and a device as those of `like`, and its dtype unless given."""
        dtype = dtype or like.dtype
        wide = torch.promote_types(dtype, torch.float32)
        across, down = (
            [feather.to(like.device, wide) for feather in axis.feathers(self.writes)]
            for axis in (self.columns, self.rows)
        )
        height, width = (axis.length * self.writes for axis in (self.rows, self.columns))
        top, bottom, _ = next(iter(self.rows.spans()))
        return Canvas(
            picture=like.new_empty(len(like), channels, height, width, dtype=dtype),
            row=like.new_zeros(len(like), channels, (bottom - top) * self.writes, width, dtype=wide),
            across=across,
            down=down,
        )

    def _cut(self, source: Tensor, top: int, bottom: int, left: int, right: int) -> Tensor:
        reads = self.reads
        return source[:, :, top * reads : bottom * reads, left * reads : right * reads]
