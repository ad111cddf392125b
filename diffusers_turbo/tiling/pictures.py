"""Pictures that are held whole while tiles of them are worked on: on the device, or in host memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Seen(NamedTuple):
    """How many pixels some rows have, and their mean and variance by channel, each `[C]`."""

    pixels: int
    mean: Tensor
    variance: Tensor


class Picture(Protocol):
    """What a stretch begins or ends with, `[1, C, H, W]`.

    Attributes:
        seen: what is known of the rows it was made of, all of them or none.
    """

    seen: list[Seen]

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
    seen: list[Seen] = field(default_factory=list)

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
    seen: list[Seen] = field(default_factory=list)

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
