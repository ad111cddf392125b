"""TF32 for matrix products and convolutions, in force during this pipeline's calls only.

The flags are process-wide, so they are held only while a call runs, counted across threads: the first call in sets
them, the last one out restores them. They are read and restored through `fp32_precision`, since after it has been set
the old `allow_tf32` names refuse to be read.
https://docs.pytorch.org/docs/stable/notes/cuda.html#tensorfloat-32-tf32-on-ampere-and-later-devices
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..planning.options import TF32
from .undo import Journal

_lock = threading.Lock()
_calls_inside = 0
_found: tuple[str, str] = ("none", "none")


class Tf32Scope:
    """A call scope that lets float32 products round their inputs to TF32's 10 mantissa bits."""

    @contextmanager
    def around_call(self, pipe: Any) -> Iterator[None]:
        """Set both flags for the block; nested and concurrent blocks share one setting."""
        global _calls_inside, _found
        matmul, convolution = torch.backends.cuda.matmul, torch.backends.cudnn.conv  # type: ignore[attr-defined]
        with _lock:
            if _calls_inside == 0:
                _found = (matmul.fp32_precision, convolution.fp32_precision)
                matmul.fp32_precision = convolution.fp32_precision = "tf32"
            _calls_inside += 1
        try:
            yield
        finally:
            with _lock:
                _calls_inside -= 1
                if _calls_inside == 0:
                    matmul.fp32_precision, convolution.fp32_precision = _found


def apply(pipe: Any, options: TF32) -> Journal:
    """Lossy: run this pipeline's float32 products in TF32 (10 mantissa bits) from its next call on."""
    return Journal(scopes=[Tf32Scope()])
