"""How long the GPU computes in a call: the rest of the call's time it waits for the host to launch something."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable

import torch
from torch.profiler import ProfilerActivity, profile

from .clock import synchronize
from .families import kernels_of

STEPS = 6
"""Calls of so many steps and of twice as many are profiled. A cache that computes every second or third step in full
does the same in both."""

Spans = list[tuple[float, float]]
"""Begin and end of each kernel or copy, in microseconds."""


def busy_seconds(
    call: Callable[[int], object], steps: int, device: torch.device, *, spans: Callable[..., Spans] | None = None
) -> float:
    """Return the seconds of a call of `steps` denoising steps in which the GPU computes or copies.

    A profile of a whole call takes longer to read than the call; what steps add is the same for each, so two short
    calls tell.

    Args:
        call: makes pictures in so many steps.
        steps: of the call that is meant.
        device: a CUDA device.
        spans: who watches a call, in place of the profiler.
    """

    def busy(count: int) -> float:
        return covered((spans or kernel_spans)(lambda: call(count), device)) / 1e6

    if steps <= 2 * STEPS:
        return busy(steps)
    few, twice = busy(STEPS), busy(2 * STEPS)
    return few + (twice - few) * (steps - STEPS) / STEPS


def kernel_spans(work: Callable[[], object], device: torch.device) -> Spans:
    """Run some work under torch's profiler and return when the GPU had something to do."""
    synchronize(device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the profiler's own clock and buffers
        with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
            work()
            synchronize(device)
        kernels = kernels_of(profiler)
    return [(kernel.begin, kernel.end) for kernel in kernels]


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Return the length of what spans cover; streams that compute at the same time count once.

    >>> covered([(0, 2), (1, 3), (5, 6)])
    4.0
    """
    total, end = 0.0, float("-inf")
    for begin, last in sorted(spans):
        total += max(0.0, last - max(begin, end))
        end = max(end, last)
    return total
