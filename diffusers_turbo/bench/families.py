"""Kernels by what they are for, told by the names that libraries and compilers give them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

FAMILIES = {
    "attention": r"sdpa|flash|fmha|attention",
    "convolutions": r"fprop|implicit_gemm|conv(?!ert)|cudnn|winograd",
    "matrix products": r"nvjet|gemm|cutlass|cublas|splitk",
    "copies and fills": r"memcpy|memset|copy",
    "PyTorch's other kernels": r"at::native|at_cuda_detail",
}
"""A pattern for each family; the first that fits counts. Triton's names come before: they list what was fused."""

TRITON, REST = "Triton's kernels", "other kernels"

WAIT_US = 20.0
"""A longer gap is no launch: the GPU waits for the host."""


@dataclass(frozen=True)
class Kernel:
    """One kernel or copy: its name, and when it began and ended, in microseconds."""

    name: str
    begin: float
    end: float


def family_of(name: str) -> str:
    """Return the family of a kernel.

    >>> family_of("sm90_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc_tilesize128x192x64")
    'convolutions'
    >>> family_of("triton_poi_fused_clone_convolution_native_group_norm_silu_143")
    "Triton's kernels"
    """
    if re.match(r"triton_|_?[a-z_]+_kernel$", name):
        return TRITON
    found = (family for family, pattern in FAMILIES.items() if re.search(pattern, name, re.IGNORECASE))
    return next(found, REST)


def kernels_of(profiler: Any) -> list[Kernel]:
    """Return what a profile, made with `acc_events=True`, saw the GPU do."""
    ran = (event for event in profiler.events() or [] if event.device_type.name == "CUDA")
    return [Kernel(event.name, event.time_range.start, event.time_range.end) for event in ran]


def describe(kernels: Sequence[Kernel]) -> str:
    """Say how long each family took, and how long nothing ran, for the time of a launch or longer."""
    if not kernels:
        return ""
    rows: dict[str, list[float]] = {}
    for kernel in kernels:
        rows.setdefault(family_of(kernel.name), []).append(kernel.end - kernel.begin)
    launches: list[float] = []
    waits: list[float] = []
    in_turn = sorted(kernels, key=lambda kernel: kernel.begin)
    end = in_turn[0].begin
    for kernel in in_turn:
        if (gap := kernel.begin - end) > 0:
            (waits if gap >= WAIT_US else launches).append(gap)
        end = max(end, kernel.end)
    lines = [_line(name, spent) for name, spent in sorted(rows.items(), key=lambda row: -sum(row[1]))]
    lines.append(_line("gaps between kernels", launches))
    if waits:
        lines.append(_line(f"gaps of {WAIT_US:.0f} us and more", waits))
    return "\n".join(lines)


def _line(name: str, spent: Sequence[float]) -> str:
    return f"{name:26}{sum(spent) / 1e3:9.3f} ms  in {len(spent)}"
