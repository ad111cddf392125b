"""`triton.jit` that imports Triton at the first launch, so that a file of kernels can be imported without it.

Triton is an optional package and slow to import. A kernel here is written as usual, `tl` included; until something is
launched, that name exists for the type checker only.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from threading import RLock
from typing import Any

_LOCK = RLock()


class LazyKernel:
    """A Triton kernel not yet handed to Triton; the first launch replaces it, in its module, by the real one."""

    def __init__(self, function: Callable[..., Any], unspecialized: Sequence[str]) -> None:
        self.function = function
        self.unspecialized = list(unspecialized)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        launcher: Callable[..., None] = self.load()[grid]
        return launcher

    def load(self) -> Any:
        """Triton's own object for this kernel: all those its module holds come with it, since they may call each other.

        Raises:
            ImportError: without Triton.
        """
        module = sys.modules[self.function.__module__]
        with _LOCK:
            if isinstance(getattr(module, self.function.__name__), LazyKernel):
                triton = importlib.import_module("triton")
                vars(module)["tl"] = importlib.import_module("triton.language")
                waiting = {name: item for name, item in vars(module).items() if isinstance(item, LazyKernel)}
                for name, item in waiting.items():
                    if item.function.__module__ != module.__name__:  # imported from another file of kernels
                        vars(module)[name] = item.load()
                    else:
                        vars(module)[name] = triton.jit(item.function, do_not_specialize=item.unspecialized)
        return getattr(module, self.function.__name__)


def jit(*unspecialized: str) -> Callable[[Callable[..., Any]], Any]:
    """Make a Triton kernel, compiled at its first launch.

    Args:
        unspecialized: integer arguments for whose value (1, or a multiple of 16) no variant of its own is compiled.
            Each variant costs a part of a second before the first image.

    What it makes is a `LazyKernel`, and Triton's own from the first launch on: of no one type, hence `Any`.
    """
    return lambda function: LazyKernel(function, unspecialized)
