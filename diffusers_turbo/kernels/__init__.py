"""Fused Triton kernels, one operation a file, each beside its plain PyTorch equal. They know tensors and no model.

Importing this room needs no Triton and imports none. A kernel is imported from its own file, which has its name:
`from diffusers_turbo.kernels.geglu import geglu`. Its first call on a GPU compiles it, and that call must not be one
that a CUDA graph records.
"""

from __future__ import annotations

from .base import Kernel, KernelLimits, is_available, unavailable
from .registry import KERNELS

__all__ = ["KERNELS", "Kernel", "KernelLimits", "is_available", "unavailable"]
