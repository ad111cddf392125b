"""Half precision for every component, with the original weights kept in host memory until it is switched off."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..attention import attention_layers
from ..facts.pipeline import read_pipeline
from ..planning.options import HalfPrecision
from .components import modules_of, require_plain_weights
from .projections import join
from .undo import Journal, journaling, owned


@dataclass
class DtypeChange:
    """One parameter or buffer whose data was cast to `dtype`; `original` is its data, kept on the CPU."""

    owner: nn.Module
    name: str
    original: torch.Tensor
    dtype: torch.dtype
    label: str

    def revert(self) -> str | None:
        """Put the original bits back, on the device and with the strides the tensor has by now."""
        tensor = owned(self.owner, self.name)
        if not isinstance(tensor, torch.Tensor):
            return f"{self.label} is gone"
        if tensor.dtype != self.dtype or tensor.shape != self.original.shape:
            return f"{self.label} was replaced meanwhile ({tensor.dtype}, shape {list(tensor.shape)})"
        if not torch.equal(tensor.data.cpu(), self.original.to(self.dtype)):
            return f"{self.label} was changed while in {_short(self.dtype)} and keeps these values and this precision"
        tensor.data = torch.empty_like(tensor.data, dtype=self.original.dtype).copy_(self.original)
        return None


@dataclass
class AddedMeanwhile:
    """Notices, when half precision goes, the weights that came under it (a LoRA, a new component) and stay."""

    pipe: Any
    known: set[int]
    dtype: torch.dtype

    def revert(self) -> str | None:
        """Count the half-precision tensors that were not there when half precision came.

        Fused weights are made of projections that have their precision back, and get it from them.
        """
        for root in modules_of(self.pipe).values():
            for attn in attention_layers(root).values():
                join(attn)
        added = sum(
            id(owner) not in self.known and tensor.dtype == self.dtype
            for _, owner, _, tensor in floating_tensors(modules_of(self.pipe))
        )
        return f"{added} tensors added meanwhile stay in {_short(self.dtype)}" if added else None

    def after_copy(self) -> None:
        """Ids mean nothing on a copy: take its modules as the known ones."""
        self.known = {id(owner) for _, owner, _, _ in floating_tensors(modules_of(self.pipe))}


def apply(pipe: Any, options: HalfPrecision) -> Journal:
    """Lossy: cast every floating-point weight to half precision; the originals wait in host memory.

    Weights that a model declares as float32-only (`_keep_in_fp32_modules`) stay.
    """
    dtype = getattr(torch, options.dtype or read_pipeline(pipe).native_dtype)
    require_plain_weights(pipe, f"{options.action}()")
    modules, kept_bytes, kept_fp32 = modules_of(pipe), 0, 0
    with journaling() as journal:
        journal.add(AddedMeanwhile(pipe, {id(owner) for _, owner, _, _ in floating_tensors(modules)}, dtype))
        for label, owner, name, tensor in floating_tensors(modules):
            if tensor.dtype == dtype or tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
                continue
            if _float32_only(label, modules):
                kept_fp32 += 1
                continue
            original = _host_copy(tensor.data)
            tensor.data = tensor.data.to(dtype)
            journal.add(DtypeChange(owner, name, original, dtype, label))
            kept_bytes += original.nbytes
        journal.note(f"originals kept in host memory: {kept_bytes / 2**20:.0f} MiB")
        if kept_fp32:
            journal.note(f"{kept_fp32} tensors stay in float32 as their models ask")
        if dtype == torch.float16 and all(p.device.type == "cpu" for m in modules.values() for p in m.parameters()):
            journal.note("float16 on a CPU is slow and may overflow to NaN: move the pipeline to a GPU or use bfloat16")
    return journal


def cast(pipe: Any, dtype: torch.dtype) -> None:
    """Cast every floating-point weight for good, except those that a model declares as float32-only."""
    modules = modules_of(pipe)
    for label, _, _, tensor in floating_tensors(modules):
        if not _float32_only(label, modules):
            tensor.data = tensor.data.to(dtype)


def floating_tensors(modules: dict[str, nn.Module]) -> Iterator[tuple[str, nn.Module, str, torch.Tensor]]:
    """Iterate over (label, owner, name, tensor) of each floating-point parameter and buffer, shared ones once."""
    seen: set[int] = set()
    for component, root in modules.items():
        for path, owner in root.named_modules():
            for name, tensor in [*owner._parameters.items(), *owner._buffers.items()]:
                if tensor is not None and tensor.is_floating_point() and id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield ".".join(filter(None, (component, path, name))), owner, name, tensor


def _float32_only(label: str, modules: dict[str, nn.Module]) -> bool:
    """Whether the model declares the module that owns `label` as one that must stay in float32."""
    component, *path = label.split(".")
    declared = getattr(modules[component], "_keep_in_fp32_modules", None) or ()
    return any(name in path for name in declared)


def _host_copy(data: torch.Tensor) -> torch.Tensor:
    """Return the data on the CPU; on the CPU the data itself, since casting makes a new tensor anyway."""
    return data if data.device.type == "cpu" else data.to("cpu")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
