"""TF32 for matrix products and convolutions, in force during this pipeline's calls only.

The flags are process-wide, so they are held only while a call runs, across threads: the first call in remembers what it
found, the last one out restores it. They are read and restored through `fp32_precision`, since after it has been set
the old `allow_tf32` names refuse to be read.
https://docs.pytorch.org/docs/stable/notes/cuda.html#tensorfloat-32-tf32-on-ampere-and-later-devices
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from ..planning.options import TF32
from .undo import Journal

_lock = threading.Lock()
_held: list[tuple[str, str]] = []
_found: tuple[str, str] = ("none", "none")


@contextmanager
def fp32_precision(value: str) -> Iterator[None]:
    """Compute float32 products in "tf32" or in "ieee" (all 23 mantissa bits) for the block.

    Of nested and concurrent blocks the one entered last is in force.
    """
    global _found
    ours = (value, value)
    with _lock:
        if not _held:
            _found = _read()
        _held.append(ours)
        _write(ours)
    try:
        yield
    finally:
        with _lock:
            _held.remove(ours)
            _write(_held[-1] if _held else _found)


def _read() -> tuple[str, str]:
    return torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]


def _write(values: tuple[str, str]) -> None:
    torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision = values  # type: ignore[attr-defined]


class Tf32Scope:
    """A call scope that lets float32 products round their inputs to TF32's 10 mantissa bits."""

    def around_call(self, pipe: Any) -> AbstractContextManager[None]:
        """Return the block for one call."""
        return fp32_precision("tf32")


def apply(pipe: Any, options: TF32) -> Journal:
    """Lossy: run this pipeline's float32 products in TF32 (10 mantissa bits) from its next call on."""
    return Journal(scopes=[Tf32Scope()])
