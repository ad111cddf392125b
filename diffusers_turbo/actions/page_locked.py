"""Page-locked host memory: what copies to a device can read beside computation, within a budget."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..planning.residents import aligned, pack
from ..planning.units import gib
from .streaming import extent, placed


def can_pin(device: torch.device) -> bool:
    """Whether host memory can be page-locked for a device."""
    return device.type not in ("cpu", "mps")


def page_locked(size: int) -> Tensor:
    """Return bytes of page-locked host memory."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


@torch.inference_mode(False)
def pin(tensors: Sequence[Tensor], budget_bytes: int) -> tuple[int, str]:
    """Move weights into page-locked memory, keeping their objects; return its bytes, and why it is not all of them."""
    slabs = pack([aligned(extent(tensor)) for tensor in tensors], budget_bytes)
    try:
        buffers = [page_locked(size) for size in slabs.sizes]
    except RuntimeError as error:
        return 0, f"the system refused: {' '.join(str(error).split())}"
    for tensor, place in zip(tensors, slabs.places, strict=True):
        if place is not None:
            home = placed(buffers[place[0]], place[1], tensor)
            home.copy_(tensor.data)
            tensor.data = home
    return sum(slabs.sizes), f"the budget of {gib(budget_bytes)} holds no more" if None in slabs.places else ""
