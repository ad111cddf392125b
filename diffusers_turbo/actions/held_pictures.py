"""Host memory for the pictures between an autoencoder's layers, of which two are there at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..facts.host import host_memory
from ..tiling.pictures import OnHost, has_channels_last
from .page_locked import Slab, can_pin


@dataclass(eq=False)
class _Pair:
    """Two pieces of memory that pictures lie in by turns: one is read while the next is written.

    Attributes:
        least_bytes: how large a piece is made at least.
        slabs: the pieces there are.
        read: on CUDA, an event past the last copy of whoever had them before.
        trouble: why they are not page-locked; empty if they are, or need not be.
    """

    least_bytes: int = 0
    slabs: list[Slab | None] = field(default_factory=lambda: [None, None])
    read: Any = None
    trouble: str = ""

    def hold(self, rows: Tensor, height: int) -> OnHost:
        """Make an empty picture of so many rows, else like the given ones `[1, C, h, W]`."""
        shape = (height, rows.shape[3], rows.shape[1])
        memory = None
        if rows.device.type != "meta":
            size = prod(shape) * rows.element_size()
            self.slabs.reverse()
            memory = self._slab(size, rows.device).bytes()[:size].view(rows.dtype).view(shape)
        return OnHost(memory, shape, rows.device, rows.dtype, channels_last=has_channels_last(rows))

    def _slab(self, size: int, device: torch.device) -> Slab:
        slab = self.slabs[0]
        if slab is None or len(slab) < size:
            slab = self.slabs[0] = None  # before the next is made
            slab = self.slabs[0] = Slab(max(size, self.least_bytes))
            if can_pin(device):
                self._lock(slab, device)
        return slab

    def _lock(self, slab: Slab, device: torch.device) -> None:
        if len(slab) > host_memory()[1] // 2:
            self.trouble = "half of what is free of host memory is less than a picture"
            return
        try:
            slab.lock(device)
        except RuntimeError as error:
            self.trouble = f"the system refused: {' '.join(str(error).split())}"


@dataclass(eq=False)
class HeldOnHost:
    """Lends a call the memory for its pictures; kept for the next one. Two calls at once have memory each.

    Attributes:
        trouble: why the last call's was not page-locked; empty if it was.
    """

    trouble: str = ""
    _free: list[_Pair] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Bytes that are kept for the next call."""
        return sum(len(slab) for pair in self._free for slab in pair.slabs if slab is not None)

    @contextmanager
    def lent(self, device: torch.device, largest_bytes: int) -> Iterator[_Pair]:
        """Have two pieces of memory inside the block."""
        pair = self._free.pop() if self._free else _Pair()
        pair.least_bytes = largest_bytes
        if pair.read is not None:
            torch.cuda.current_stream(device).wait_event(pair.read)
        try:
            yield pair
        finally:
            if device.type == "cuda":
                pair.read = torch.cuda.Event()  # type: ignore[no-untyped-call]
                pair.read.record(torch.cuda.current_stream(device))
            self.trouble = pair.trouble
            self._free.append(pair)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the memory behind; a copy makes its own."""
        return {**vars(self), "_free": []}
