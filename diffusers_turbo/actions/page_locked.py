"""Page-locked host memory: what copies to a device can read beside computation, within a budget.

Weights are copied into ordinary memory of the process, which is then locked as it lies. On the host of an H100 this
takes a fifth of the time in which the driver gives out memory that is locked from the start: 0.12 s against 1.1 s for
two GiB, and as long again for pages that are written for the first time.
"""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from ..facts.host import host_memory
from ..planning.options import PartialOffload
from ..planning.residents import aligned, pack
from ..planning.units import gib
from .streaming import extent, placed

_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
"""How memory is mapped; Windows knows no other way."""


def can_pin(device: torch.device) -> bool:
    """Whether host memory can be page-locked for a device."""
    return device.type == "cuda"


def _runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


class Slab(mmap.mmap):
    """Memory of this process, which can be page-locked and is so until it goes, after all tensors that lie in it."""

    address = 0
    owner = 0
    device = None

    def __new__(cls, size: int) -> Slab:
        """Map `size` bytes of zeros; none of them takes memory until it is written."""
        return super().__new__(cls, -1, max(size, 1), **_PRIVATE)

    def bytes(self) -> Tensor:
        """Return it as a tensor, which keeps it alive."""
        return torch.frombuffer(self, dtype=torch.uint8)

    def lock(self, device: torch.device) -> None:
        """Lock the pages, for copies to a CUDA device.

        Raises:
            RuntimeError: the system refuses.
        """
        address = self.bytes().data_ptr()
        torch.cuda.check_error(_runtime().cudaHostRegister(address, len(self), 0))
        self.address, self.owner, self.device = address, os.getpid(), device

    def __del__(self) -> None:
        """Unlock the pages, when no copy reads from them any more."""
        # the lock is not a forked child's, and goes with the process
        if self.address and self.owner == os.getpid() and not sys.is_finalizing():
            if not torch.cuda.is_current_stream_capturing():
                torch.cuda.synchronize(self.device)
            _runtime().cudaHostUnregister(self.address)


@torch.inference_mode(False)
def pin(tensors: Sequence[Tensor], budget_bytes: int, device: torch.device) -> tuple[list[Slab], str]:
    """Move weights into page-locked memory, keeping their objects; return it, and why it does not hold all of them."""
    packed = pack([aligned(extent(tensor)) for tensor in tensors], budget_bytes)
    slabs = [Slab(size) for size in packed.sizes]
    buffers = [slab.bytes() for slab in slabs]
    for tensor, place in zip(tensors, packed.places, strict=True):
        if place is not None:
            home = placed(buffers[place[0]], place[1], tensor)
            home.copy_(tensor.data)
            tensor.data = home
    for done, slab in enumerate(slabs):
        try:
            slab.lock(device)
        except RuntimeError as error:
            return slabs[:done], f"the system refused: {' '.join(str(error).split())}"
    return slabs, f"the budget of {gib(budget_bytes)} holds no more" if None in packed.places else ""


@dataclass(eq=False)
class PinnedMemory:
    """Page-locked memory that a pipeline's weights wait in, up to a budget.

    Attributes:
        slabs: what there is of it; each goes with the weights that lie in it.
        trouble: why it does not hold all that it was to hold; empty if it does.
    """

    device: torch.device
    options: PartialOffload
    slabs: WeakSet[Slab] = field(default_factory=WeakSet)
    trouble: str = ""
    _all_streamed: bool = False

    @property
    def size(self) -> int:
        """Bytes of it."""
        return sum(map(len, self.slabs))

    @property
    def is_wanted(self) -> bool:
        """Whether weights are meant to wait in it, where that is a matter."""
        return self.options.pin_memory or not can_pin(self.device)

    @property
    def holds_streamed(self) -> bool:
        """Whether all that is streamed waits in it, where that is a matter."""
        return self._all_streamed or not can_pin(self.device)

    def take_all(self, tensors: Sequence[Tensor]) -> None:
        """Move weights into it, if there is room for all of them."""
        if self._is_used and sum(aligned(extent(tensor)) for tensor in tensors) <= self._budget:
            self._take(tensors)

    def take(self, streamed: Sequence[Tensor], visiting: Sequence[Tensor]) -> None:
        """Move into it what is streamed, and then what comes and goes, as far as the budget goes."""
        self.trouble, self._all_streamed = "", False
        if self._is_used:
            self._take([tensor for tensor in (*streamed, *visiting) if not tensor.is_pinned()])
            self._all_streamed = all(tensor.is_pinned() or not tensor.numel() for tensor in streamed)

    def _take(self, tensors: Sequence[Tensor]) -> None:
        left = max(0, self._budget - self.size)
        slabs, self.trouble = pin(list(dict.fromkeys(tensors)), left, self.device)
        self.slabs.update(slabs)

    @property
    def _is_used(self) -> bool:
        return self.options.pin_memory and can_pin(self.device)

    @cached_property
    def _budget(self) -> int:
        """Bytes at most: by default half of what is free before any of it is taken."""
        return int(self.options.pinned_bytes) if self.options.pinned_bytes is not None else host_memory()[1] // 2
