"""Which timestep it is, without asking the device: a view of `scheduler.timesteps` tells by where it lies in memory."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class HostTimesteps:
    """A scheduler's timesteps as the device has them and as the host has them.

    A pipeline iterates over `scheduler.timesteps`, whole or from some index on, and iteration gives views. The offset
    of such a view in the shared storage is its index, and that is known to the host.
    """

    def __init__(self) -> None:
        self.on_device: Tensor | None = None
        self.on_host: Tensor | None = None
        self.version = 0

    def hold(self, on_device: Tensor, on_host: Tensor) -> None:
        """Remember timesteps `[N]` in both places."""
        self.on_device, self.on_host, self.version = on_device, on_host, _version(on_device)

    def holds(self, timesteps: Any) -> bool:
        """Whether these are the timesteps held, and nobody wrote into them."""
        return self.on_device is not None and timesteps is self.on_device and _version(self.on_device) == self.version

    def value(self, timesteps: Any, timestep: Any) -> Tensor | None:
        """Return `timestep` `[]` as the host has it; None when it is no view of `timesteps` and has to be read."""
        index = view_index(timesteps, timestep)
        if index is None:
            return None
        if not self.holds(timesteps):
            # set by hand: read once, as the host's own method would at every step
            self.hold(timesteps, timesteps.cpu())
        assert self.on_host is not None
        return self.on_host[index]


def view_index(timesteps: Any, timestep: Any) -> int | None:
    """Return i when `timestep` is a view of `timesteps[i]`, None when it is anything else.

    >>> import torch
    >>> timesteps = torch.tensor([30, 20, 10])
    >>> [view_index(timesteps, t) for t in timesteps[1:]]
    [1, 2]
    >>> view_index(timesteps, torch.tensor(20)) is None
    True
    """
    if not (isinstance(timesteps, Tensor) and isinstance(timestep, Tensor)):
        return None
    if timesteps.dim() != 1 or timestep.dim() != 0 or not timesteps.numel():
        return None
    if timesteps.dtype != timestep.dtype or timesteps.device != timestep.device:
        return None
    if timesteps.untyped_storage().data_ptr() != timestep.untyped_storage().data_ptr():
        return None
    offset = int(timestep.storage_offset()) - int(timesteps.storage_offset())
    index, between = divmod(offset, int(timesteps.stride(0)) or 1)
    return index if not between and 0 <= index < len(timesteps) else None


def _version(tensor: Tensor) -> int:
    # tensors made under inference_mode count no versions
    return 0 if tensor.is_inference() else tensor._version
