"""What the host did while the GPU had nothing to do: the main thread's stack, sampled through a whole call."""

from __future__ import annotations

import sys
import threading
import time
import traceback
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import PurePath

import torch
from torch.profiler import ProfilerActivity, profile

from .clock import synchronize
from .families import WAIT_US, kernels_of

EVERY_S = 0.0005
"""Between two samples."""

LINES = 40
"""Of the table of functions."""

Frame = tuple[str, str, int]
"""Function, file and the line where it is."""


@dataclass(frozen=True)
class Sample:
    """Where the main thread was at a time, in microseconds; outermost frame first."""

    at: float
    stack: tuple[Frame, ...]
    outside: int = 0
    """How many of the frames are those of whoever watches."""


@dataclass
class Watched:
    """A call that was watched: its begin and end, samples of its stack and the spans of kernels, in microseconds."""

    begin: float = 0.0
    end: float = 0.0
    samples: list[Sample] = field(default_factory=list)
    spans: list[tuple[float, float]] = field(default_factory=list)

    def waits(self) -> Iterator[tuple[float, float]]:
        """Yield begin and end of each time in which the GPU waited for the host."""
        end = self.begin
        for begin, last in [*sorted(self.spans), (self.end, self.end)]:
            if begin - end >= WAIT_US:
                yield end, begin
            end = max(end, last)


def watch(call: Callable[[], object], device: torch.device) -> Watched:
    """Make a call, with the kernels seen by torch's profiler and the stack sampled by a thread.

    Both slow the host down, so that parts can be compared, not totals.
    """
    synchronize(device)
    found = Watched()
    activity = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the profiler's own clock and buffers
        with profile(activities=[activity], acc_events=True) as profiler, sampled(found.samples):
            found.begin = time.time_ns() / 1e3
            call()
            synchronize(device)
            found.end = time.time_ns() / 1e3
        # the thread is there a little longer than the call
        found.samples = [sample for sample in found.samples if found.begin <= sample.at <= found.end]
        start = profiler.profiler.kineto_results.trace_start_ns() / 1e3
        found.spans = [(start + kernel.begin, start + kernel.end) for kernel in kernels_of(profiler)]
    return found


@contextmanager
def sampled(samples: list[Sample]) -> Iterator[None]:
    """Note, every so often, where the thread that enters is."""
    watched, done = threading.get_ident(), threading.Event()
    interval = sys.getswitchinterval()
    outside = sum(1 for _ in traceback.walk_stack(sys._getframe(2)))  # this function and __enter__ are gone then

    def look() -> None:
        while not done.wait(EVERY_S):
            frame, stack = sys._current_frames().get(watched), []
            at = time.time_ns() / 1e3
            while frame is not None:
                stack.append((frame.f_code.co_qualname, frame.f_code.co_filename, frame.f_lineno or 0))
                frame = frame.f_back
            samples.append(Sample(at, tuple(reversed(stack)), outside))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    sys.setswitchinterval(EVERY_S / 2)  # the interpreter is asked for more often than a thread would be let in
    try:
        yield
    finally:
        done.set()
        thread.join()
        sys.setswitchinterval(interval)


def describe_waits(found: Watched) -> str:
    """Say how long the GPU waited, and in which lines of the pipeline and which functions the host was meanwhile."""
    waits = list(found.waits())
    lines: defaultdict[str, float] = defaultdict(float)
    functions: defaultdict[str, float] = defaultdict(float)
    for sample, micros in _weighed(found.samples, waits):
        lines[_line_of(sample.stack)] += micros
        # what lies outside of the call is the same for all
        for function in {_place(*frame[:2]) for frame in sample.stack[sample.outside :]}:
            functions[function] += micros
    total = sum(end - begin for begin, end in waits)
    first = waits[0][1] - found.begin if waits and waits[0][0] == found.begin else 0.0
    parts = [
        f"a call of {(found.end - found.begin) / 1e3:.1f} ms; the GPU had nothing to do for {total / 1e3:.1f} of them, "
        f"{len(waits)} times; for {first / 1e3:.1f} ms before its first kernel",
        "\nby the line of the pipeline (ms)",
        *_rows(lines),
        "\nby function, with all that it called (ms)",
        *_rows(functions),
    ]
    return "\n".join(parts)


def _weighed(samples: Sequence[Sample], waits: Sequence[tuple[float, float]]) -> Iterator[tuple[Sample, float]]:
    """Give each sample the waiting time between it and the one before."""
    before, first = float("-inf"), 0
    for sample in samples:
        micros = 0.0
        for index in range(first, len(waits)):  # both are in order
            begin, end = waits[index]
            if begin >= sample.at:
                break
            micros += max(0.0, min(end, sample.at) - max(begin, before))
            first = index
        if micros:
            yield sample, micros
        before = sample.at


def _line_of(stack: Sequence[Frame]) -> str:
    """Return the line of the outermost call of a pipeline of diffusers, or where the thread is before and after it."""
    calls = (frame for frame in stack if "pipelines" in PurePath(frame[1]).parts and frame[0].endswith(".__call__"))
    return _place(*next(calls, stack[-1]))


def _place(name: str, file: str, line: int | None = None) -> str:
    where = "/".join(PurePath(file).parts[-2:])
    return f"{name} ({where})" if line is None else f"{name}:{line} ({where})"


def _rows(spent: Mapping[str, float]) -> Iterator[str]:
    for name, micros in sorted(spent.items(), key=lambda row: -row[1])[:LINES]:
        yield f"{micros / 1e3:9.2f}  {name}"
