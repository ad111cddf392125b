"""Time that counts the device's work: the host's clock, read when the device has caught up."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def timed(work: Callable[[], T], device: torch.device) -> tuple[float, T]:
    """Return the seconds some work took on the host and the device together, and its result."""
    synchronize(device)
    start = time.perf_counter()
    result = work()
    synchronize(device)
    return time.perf_counter() - start, result


def seconds_a_call(call: Callable[[], object], device: torch.device, calls: int) -> float:
    """Return the seconds of one call, over so many between two synchronisations."""

    def repeatedly() -> None:
        for _ in range(calls):
            call()

    return timed(repeatedly, device)[0] / calls


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
