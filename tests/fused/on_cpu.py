"""The kernels' place taken by their plain equals on the CPU, through the one table that their callers look into."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from diffusers_turbo.actions.fused_kernels import apply
from diffusers_turbo.actions.undo import Journal
from diffusers_turbo.kernels.base import DTYPES, Kernel, Place
from diffusers_turbo.kernels.registry import KERNELS
from diffusers_turbo.planning.options import FusedKernels


class PlainOnCPU(Kernel):
    """Runs on the CPU, and takes the tensors that the kernel takes and no others."""

    def places(self) -> frozenset[Place]:
        return frozenset(("cpu", dtype) for dtype in DTYPES)


def plain_kernels(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Put them in the table and return how often each was called; as "layer_norm" that without anything to add."""
    calls = dict.fromkeys((*KERNELS, "layer_norm"), 0)
    for name, kernel in KERNELS.items():

        def run(x: torch.Tensor, *args: Any, name: str = name, kernel: Kernel = kernel, **options: Any) -> Any:
            assert kernel.misfits(x, *args, **options) == []
            calls["layer_norm" if name == "add_layer_norm" and args[0] is None else name] += 1
            result = kernel.plain(x, *args, **options)
            return torch.empty_like(x).copy_(result) if name == "group_norm" else result

        fields = {key: getattr(kernel, key) for key in ("plain", "misfits", "reasons", "limits", "tolerance")}
        monkeypatch.setitem(KERNELS, name, PlainOnCPU(run=run, **fields))
    return calls


def fuse(module: nn.Module) -> Journal:
    """Throw the switch on a module as if it were a pipeline's UNet."""
    return apply(SimpleNamespace(components={"unet": module}), FusedKernels())
