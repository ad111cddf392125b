"""From the host to the device without waiting: through page-locked memory, by copies that the device does in its turn.

An ordinary copy to a GPU waits until the GPU has caught up. A copy from page-locked memory is only put in its queue.
The memory must stay as it is until then, and torch's host allocator lends a block anew only when its copies are done.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

PINNED_FOR = ("cuda",)
"""Device types for which page-locked memory is used."""

_ALIGNMENT = 64


def page_locked(size: int) -> Tensor:
    """Return page-locked memory of `size` bytes."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


class Staging:
    """Page-locked memory of one denoising loop, lent in pieces; each piece is written once."""

    def __init__(self) -> None:
        self.block: Tensor | None = None
        self.used_bytes = 0
        self.pieces = 1

    def restart(self, pieces: int = 1) -> None:
        """Let go of the memory; the next block will hold so many pieces of the size first asked for.

        Locking pages costs the host time, so it is done once a loop and not at every step.
        """
        self.block, self.used_bytes, self.pieces = None, 0, max(1, pieces)

    def to_device(self, tensor: Tensor, device: torch.device) -> Tensor:
        """Return `tensor`, which is in host memory, on the device; nobody waits for the copy."""
        if device.type not in PINNED_FOR:
            return tensor.to(device)
        size = tensor.numel() * tensor.element_size()
        room = -(-size // _ALIGNMENT) * _ALIGNMENT
        if self.block is None or self.used_bytes + room > self.block.numel():
            self.block, self.used_bytes = page_locked(room * self.pieces), 0
        piece = self.block[self.used_bytes : self.used_bytes + size].view(tensor.dtype).view(tensor.shape)
        self.used_bytes += room
        return piece.copy_(tensor).to(device, non_blocking=True)

    def noise(self, shape: Any, generator: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Draw the numbers that the host's `randn_tensor` would draw from generators in host memory."""
        from diffusers.utils.torch_utils import randn_tensor

        drawn: Tensor = randn_tensor(shape, generator=generator, device=torch.device("cpu"), dtype=dtype)
        return self.to_device(drawn, device)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the memory behind: a copy gets its own."""
        return {**vars(self), "block": None, "used_bytes": 0}


def draws_on_host(generator: Any, device: torch.device) -> bool:
    """Whether noise for `device` comes from generators in host memory, and so has to be copied there."""
    first = generator[0] if isinstance(generator, list) and generator else generator
    return isinstance(first, torch.Generator) and first.device.type == "cpu" and is_elsewhere(device)


def is_elsewhere(device: torch.device) -> bool:
    """Whether what is on `device` is out of the host's reach, so that reading it means waiting."""
    return device.type != "cpu"
