"""The switches that take work off the host: a loop that never waits, networks launched as a whole."""

from __future__ import annotations

import torch

from .facts.pipeline import device_without_hooks
from .planning import options as opt
from .switching import Switching


class RelievesTheHost(Switching):
    """Part of TurboMixin: what keeps a GPU from waiting for Python."""

    @property
    def _execution_device(self) -> torch.device:
        """Where a call computes, as diffusers has it, in a tenth of the time; nothing runs before it is answered."""
        device = device_without_hooks(self)
        return super()._execution_device if device is None else device  # type: ignore[misc]

    def enable_sync_free_loop(self) -> None:
        """Exact: between the first step and the last the scheduler never makes the host wait for the GPU.

        It steps with timesteps from host memory, and noise of a CPU generator goes to the GPU through page-locked
        memory, the same numbers in the same order. On the CPU this changes nothing.

        Raises:
            NotSupportedError: the scheduler is of a kind whose steps are not known to this package, or is hooked.
        """
        self._enable(opt.SyncFreeLoop())

    def disable_sync_free_loop(self) -> None:
        """Switch `enable_sync_free_loop` off: the scheduler's own methods come back."""
        self._disable("enable_sync_free_loop")

    def enable_cuda_graphs(self, max_graphs: int = 8) -> None:
        """Exact: record each component's work as CUDA graphs and replay it, with or without compilation.

        Results are copies, safe to keep. A change of weights, adapters, processors or their numbers records anew; a
        call that cannot be recorded runs as it would without graphs, and the report says why.

        Args:
            max_graphs: graphs kept for each component, one a size and batch; the least recently used goes first.

        Raises:
            NotSupportedError: not on a CUDA device, or offload is on.
        """
        self._enable(opt.CUDAGraphs(max_graphs=max_graphs))

    def disable_cuda_graphs(self) -> None:
        """Switch `enable_cuda_graphs` off and give the graphs' memory back."""
        self._disable("enable_cuda_graphs")
