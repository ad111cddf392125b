"""How fast the device really is, measured in the run itself: one matrix product, one copy. Under two seconds.

A card throttled by heat, a power limit or another process shows here, where its name and driver do not.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

from .clock import seconds_a_call

_BUDGET_S = 0.5  # for each of the two rates, after warming up
_REPEATS = 7
_HOST_SIZE = 1024
_DEVICE_SIZE = 4096
# A product of 4096^3 is over in 0.2 ms on the largest cards, where launching still counts; those get the next size.
_LARGE_SIZE = 8192
_LARGE_BELOW_S = 1e-3
_HOST_COPY_BYTES = 128 * 2**20  # well past any last-level cache of a desktop CPU
_DEVICE_COPY_BYTES = 256 * 2**20  # five times the largest L2 of SM 9.0


def measure_rates(device: str, dtype: str) -> dict[str, Any]:
    """Return `matmul_tflops` and `copy_gb_per_s` with the dtype and sizes used.

    Random data from a generator of its own, since zeros draw less power and are clocked higher. A copied byte counts
    twice, as it is read and written, which is how bandwidths of cards are stated.

    Args:
        device: the torch device.
        dtype: of the matrix product and the copy: "float16", "float32".

    Raises:
        RuntimeError: the device is not usable, or has no memory left for it.
    """
    on_host = torch.device(device).type == "cpu"
    kind: torch.dtype = getattr(torch, dtype)
    size = _HOST_SIZE if on_host else _DEVICE_SIZE
    seconds = _time_matmul(device, kind, size)
    if not on_host and seconds < _LARGE_BELOW_S:
        size = _LARGE_SIZE
        seconds = _time_matmul(device, kind, size)
    copy_bytes = _HOST_COPY_BYTES if on_host else _DEVICE_COPY_BYTES
    copy_s = _time_copy(device, kind, copy_bytes)
    if not on_host and torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
    return {
        "matmul_tflops": round(2 * size**3 / seconds / 1e12, 4),
        "matmul_dtype": dtype,
        "matmul_size": size,
        "copy_gb_per_s": round(2 * copy_bytes / copy_s / 1e9, 2),
        "copy_dtype": dtype,
        "copy_bytes": copy_bytes,
    }


def _time_matmul(device: str, dtype: torch.dtype, size: int) -> float:
    left, right = _random((2, size, size), device, dtype).unbind()
    out = torch.empty_like(left)
    return _median_s(lambda: torch.mm(left, right, out=out), device)


def _time_copy(device: str, dtype: torch.dtype, size_bytes: int) -> float:
    source = _random((size_bytes // dtype.itemsize,), device, dtype)
    target = torch.empty_like(source)
    return _median_s(lambda: target.copy_(source), device)


def _random(shape: tuple[int, ...], device: str, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(0)
    return torch.rand(shape, generator=generator, device=device, dtype=dtype)


def _median_s(call: Callable[[], object], device: str) -> float:
    """Time `call`, launched several times between two synchronisations where one alone is short."""
    place = torch.device(device)
    with torch.inference_mode():
        for _ in range(2):  # the first call chooses a kernel and fills pages, the second wakes the clock
            call()
        single_s = seconds_a_call(call, place, 1)
        launches = max(1, min(20, int(_BUDGET_S / _REPEATS / max(single_s, 1e-6))))
        repeats = max(1, min(_REPEATS, int(_BUDGET_S / (launches * single_s))))
        return statistics.median(seconds_a_call(call, place, launches) for _ in range(repeats))
