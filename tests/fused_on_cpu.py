"""The kernels' place taken by their plain equals on the CPU, through the one table that their callers look into."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from diffusers_turbo.kernels.base import DTYPES, Kernel, Place
from diffusers_turbo.kernels.registry import KERNELS


class PlainOnCPU(Kernel):
    """Runs on the CPU whatever the kernel takes, in its memory layout; `calls` counts."""

    def places(self) -> frozenset[Place]:
        return frozenset(("cpu", dtype) for dtype in DTYPES)


def plain_kernels(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Put them in the table and return how often each was called."""
    calls = dict.fromkeys(KERNELS, 0)
    for name, kernel in KERNELS.items():

        def run(x: torch.Tensor, *args: Any, name: str = name, kernel: Kernel = kernel, **options: Any) -> Any:
            calls[name] += 1
            result = kernel.plain(x, *args, **options)
            return torch.empty_like(x).copy_(result) if name == "group_norm" else result

        fields = {key: getattr(kernel, key) for key in ("plain", "misfits", "reasons", "limits", "tolerance")}
        monkeypatch.setitem(KERNELS, name, PlainOnCPU(run=run, **fields))
    return calls
