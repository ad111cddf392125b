"""The seam to CUDA: recording what a function launches, replaying it, giving its memory back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch

from .memsets import driver_for, memsets_by_kernels


def is_recording(device: torch.device) -> bool:
    """Whether what is launched now is recorded for a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def return_cached(device: torch.device) -> None:
    """Return to a device what its allocator keeps for allocations to come."""
    if device.type not in ("cpu", "mps"):
        torch.get_device_module(device).empty_cache()


class Capture(Protocol):
    """A recorded run. Its output tensors are its own and are overwritten by each replay."""

    output: Any

    def in_turn(self) -> AbstractContextManager[None]:
        """Return the block to fill inputs, replay and read outputs in; it waits for any such block before it."""

    def replay(self) -> None:
        """Run again what was recorded, on the values that its input tensors hold now."""

    def release(self) -> None:
        """Give the memory back."""


class CudaCapture:
    """One CUDA graph with a memory pool of its own, so that releasing it really frees.

    https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
    """

    def __init__(self, run: Callable[[], Any], device: torch.device) -> None:
        """Record `run`, which must have run before, so that libraries have chosen their kernels.

        Raises:
            RuntimeError: it does something that cannot be recorded.
        """
        self.device = device
        self._read = torch.cuda.Event()  # type: ignore[no-untyped-call]
        with torch.cuda.device(device):
            self._record(run)
            if driver := driver_for(torch.cuda.current_device()):
                try:
                    memsets_by_kernels(self.graph.raw_cuda_graph(), driver)
                except RuntimeError:  # half of it may be done: as it was, then
                    self.release()
                    self._record(run)
            self.graph.instantiate()

    def _record(self, run: Callable[[], Any]) -> None:
        self.graph = torch.cuda.CUDAGraph(keep_graph=True)  # not instantiated at once
        # "thread_local": another thread may allocate meanwhile
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.output = run()

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Wait, on the device, until an earlier block on another stream has read its outputs."""
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(self._read)
        yield
        self._read.record(stream)

    def replay(self) -> None:
        """Run the graph on the current stream."""
        self.graph.replay()

    def release(self) -> None:
        """Reset the graph and return its pool to the device."""
        self.output = None
        self.graph.reset()
        torch.cuda.empty_cache()


CAPTURES: dict[str, Callable[[Callable[[], Any], torch.device], Capture]] = {"cuda": CudaCapture}
"""Device type -> how its calls are captured."""
