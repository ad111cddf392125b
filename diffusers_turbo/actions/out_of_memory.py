"""Errors of exhausted device memory: which they are, and letting go of what they hold."""

from __future__ import annotations

import gc
import traceback

import torch

from ..errors import with_causes

_FAILED_ALLOCATIONS = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
"""How libraries name it that allocate without torch (torch/csrc/cuda)."""


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether device memory is what was missing, in the error or in one that a compiler wrapped into its own."""
    return any(
        isinstance(found, torch.OutOfMemoryError)
        or (isinstance(found, RuntimeError) and any(text in str(found) for text in _FAILED_ALLOCATIONS))
        for found in with_causes(error, "inner_exception", "__cause__")
    )


def let_go(error: BaseException) -> None:
    """Empty the frames that an error and its causes went through: they hold the activations."""
    for found in with_causes(error, "__cause__", "__context__"):
        traceback.clear_frames(found.__traceback__)
        found.__traceback__ = None


def empty_cache() -> None:
    """Give back what no tensor needs."""
    gc.collect()
    torch.cuda.empty_cache()
