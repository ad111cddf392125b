"""What a device's allocator keeps beyond its tensors, and when that is in the way of what comes next.

The allocator takes memory from the device in segments and gives one back only when it is wholly free. A weight, or a
table of two megabytes that is made for a call, is laid into any that has room, and may then hold the half gigabyte that
a decode has left: the next decode finds no place for it, although the bytes that are free are many more than it needs.
"""

from __future__ import annotations

from typing import Any

import torch

from ..graphs.capture import is_recording, return_cached


def usable_bytes(device: torch.device) -> int | None:
    """Return what this process may hold on the device; None where that is not known."""
    if device.type != "cuda":
        return None
    # of "cuda" alone it tells no fraction
    index = torch.cuda.current_device() if device.index is None else device.index
    free, total = torch.cuda.mem_get_info(index)
    fraction = getattr(torch.cuda, "get_per_process_memory_fraction", lambda index: 1.0)(index)
    return min(free + torch.cuda.memory_reserved(index), int(total * fraction))


def may_be_in_the_way(allocated: int, reserved: int, peak: int, usable: int) -> bool:
    """Whether the most that was needed so far would not fit if nothing of what is cached could be used for it.

    Args:
        allocated, reserved: bytes that tensors hold, and the allocator with what it has cached.
        peak: bytes that tensors held at most; somebody may have reset it, and what is reserved stands in for it then.
        usable: bytes that the process may hold.

    >>> may_be_in_the_way(allocated=20, reserved=2300, peak=2250, usable=2545)
    True
    >>> may_be_in_the_way(allocated=20, reserved=2300, peak=2250, usable=8000)
    False
    """
    cached = reserved - allocated
    return cached > 0 and max(peak, reserved) + cached > usable


def is_in_the_way(device: torch.device) -> bool:
    """Whether what is cached on a device may be in the way; no counter that others read is reset for it."""
    if device.type != "cuda" or is_recording(device):
        return False
    stats: dict[str, Any] = torch.cuda.memory_stats_as_nested_dict(device)
    usable = usable_bytes(device) if stats else None
    if usable is None:
        return False
    allocated, reserved = (stats[name]["all"] for name in ("allocated_bytes", "reserved_bytes"))
    return may_be_in_the_way(allocated["current"], reserved["current"], allocated["peak"], usable)


def return_cached_if_tight(device: torch.device) -> None:
    """Return what is cached where it may be in the way; with room it stays, since taking it anew costs time."""
    if is_in_the_way(device):
        return_cached(device)
