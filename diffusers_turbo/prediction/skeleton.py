"""A pipeline's second self without weights: the same modules and processors, every tensor on the meta device."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..actions.components import modules_of
from ..actions.undo import LEDGER_ATTRIBUTE
from ..facts.pipeline import PipelineFacts, read_pipeline

LEFT_BEHIND = ("_hf_hook", "_diffusers_hook", "_old_forward", "forward")
"""What offload hooks, traces, exports and fused kernels set on single modules. Some hold weights, which a copy would
copy; what they do to memory is modelled, or is said not to be."""

_TABLES = (dict, OrderedDict)

_NONE_YET: Mapping[str, nn.Module] = {}


@dataclass
class Skeleton:
    """A pipeline to run on the meta device, and what the real one is.

    Attributes:
        pipe: the second self; switches of this package can be thrown on it.
        facts: of the real pipeline.
        left_out: components that could not be copied, by name, with the reason.
    """

    pipe: Any
    facts: PipelineFacts
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The copied components by name, in the pipeline's order."""
        return {name: part for name, part in modules_of(self.pipe).items() if name not in self.left_out}


def skeleton_of(
    pipe: Any, facts: PipelineFacts | None = None, *, copied: Mapping[str, nn.Module] = _NONE_YET
) -> Skeleton:
    """Copy a pipeline's structure. No weight is read, copied or moved, and nothing of the pipeline changes.

    Args:
        pipe: a diffusers pipeline.
        facts: what `read_pipeline` says of it, where that is known already.
        copied: components of an earlier skeleton to take as they are.

    Raises:
        NotSupportedError: no diffusers pipeline, or one without a denoiser.
    """
    facts = facts or read_pipeline(pipe)
    double = object.__new__(type(pipe))
    vars(double).update({name: value for name, value in vars(pipe).items() if name != LEDGER_ATTRIBUTE})
    skeleton = Skeleton(double, facts)
    for name, module in modules_of(pipe).items():
        if name in copied:
            vars(double)[name] = copied[name]
            continue
        vars(double)[name] = None  # never the real one: switches are thrown on what is here
        part = facts.component(name)
        reason = part.quantised if part is not None else None
        if reason:
            skeleton.left_out[name] = f"its weights are quantised ({reason})"
            continue
        try:
            vars(double)[name] = on_meta(module)
        except Exception as error:  # whatever an object hung on a module by others does when it is copied
            skeleton.left_out[name] = f"its structure cannot be copied ({type(error).__name__}: {error})"
    return skeleton


def on_meta(module: nn.Module) -> nn.Module:
    """Copy a module with meta tensors in place of its own: same shapes, strides, dtypes and shared storages.

    >>> on_meta(nn.Linear(2, 3)).weight
    Parameter containing:
    tensor(..., device='meta', size=(3, 2), requires_grad=True)
    """
    storages: dict[int, torch.UntypedStorage] = {}
    # what deepcopy finds here it takes for copied
    done: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        done.setdefault(id(tensor), _hollow(tensor, storages))
    for part in module.modules():
        done.update({id(vars(part)[name]): None for name in LEFT_BEHIND if name in vars(part)})
        # a dozen empty tables of hooks a module, which deepcopy would spend most of its time on
        done.update({id(table): type(table)() for table in vars(part).values() if type(table) in _TABLES and not table})
    twin: nn.Module = copy.deepcopy(module, done)
    for part in twin.modules():
        for name in LEFT_BEHIND:
            vars(part).pop(name, None)
    return twin.eval()


def _hollow(tensor: Tensor, storages: dict[int, torch.UntypedStorage]) -> Tensor:
    """A meta tensor like this one, on a meta storage for each storage."""
    real = tensor.untyped_storage()
    if real._cdata not in storages:
        storages[real._cdata] = torch.empty(real.nbytes(), dtype=torch.uint8, device="meta").untyped_storage()
    made = torch.empty(0, dtype=tensor.dtype, device="meta")
    made.set_(storages[real._cdata], tensor.storage_offset(), tensor.shape, tensor.stride())
    return nn.Parameter(made, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made
