"""The switch of the denoising loop."""

from __future__ import annotations

from .planning import options as opt
from .switching import Switching


class LoopsWithoutWaiting(Switching):
    """Part of TurboMixin: a denoising loop in which the host never waits for the GPU."""

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
