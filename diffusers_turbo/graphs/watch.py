"""When a graph is out of date: the addresses of weights and the plain numbers that it baked in have changed."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

NUMBERS = ("scaling", "_active_adapter", "_disable_adapters", "merged_adapters", "s1", "s2", "b1", "b2")
"""Attributes of modules that change what they compute: of peft's LoRA layers (peft.tuners.lora.layer) and FreeU's
(diffusers.utils.torch_utils.apply_freeu)."""

HOOKS = ("_hf_hook", "_diffusers_hook")
"""Where accelerate and diffusers hang hooks that move weights or run Python in the middle of a call."""


class Watch:
    """A module tree as a graph saw it.

    `take` walks all of it, a millisecond or two for a UNet, once a call of the pipeline. `numbers` reads what a
    callback may change between two steps, in microseconds. Both name objects by weak references: ids come back.
    """

    def __init__(self, root: nn.Module) -> None:
        """Take the tree down."""
        self.root = root
        self._holders: list[tuple[dict[str, Any], tuple[str, ...]]] = []
        self.fingerprint = self.take()

    def take(self) -> tuple[Any, ...]:
        """Return what must be the same for a graph to be valid: modules, addresses, hooks, training flags."""
        found: list[Any] = []
        self._holders = []
        for module in self.root.modules():
            state = vars(module)
            found += (weakref.ref(module), module.training, _named(state.get("forward")))
            found += (len(module._forward_hooks), len(module._forward_pre_hooks))
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None:
                    found += (tensor.data_ptr(), tensor.dtype)
            names = tuple(name for name in (*NUMBERS, "processor") if name in state or name in module._modules)
            if names:
                self._holders.append((state, names))
        return tuple(found)

    def numbers(self) -> tuple[Any, ...]:
        """Return the plain numbers and the processors in force."""
        found: list[Any] = []
        for state, names in self._holders:
            for name in names:
                # a processor with weights is a module, kept in another table
                value = state.get(name, state["_modules"].get(name))
                found += (_named(value), repr(getattr(value, "scale", None))) if name == "processor" else (repr(value),)
        return tuple(found)


def _draws_or_learns(module: nn.Module) -> bool:
    """Whether training mode matters to a module; adapters' layers are left in it and do not care."""
    dropout = isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
    return dropout or isinstance(module, nn.modules.batchnorm._BatchNorm)


def _named(value: object) -> object:
    """A name of an object that no other object ever gets; compares by identity as long as it lives."""
    try:
        return weakref.ref(value)
    except TypeError:  # None, a bound method's like: kept as it is
        return value


def why_not_capturable(root: nn.Module) -> str | None:
    """Return why a module's calls must not be captured, None when they may be."""
    for name, module in root.named_modules():
        place = f"{type(root).__name__}.{name}" if name else type(root).__name__
        if any(hook in vars(module) for hook in HOOKS):
            return f"{place} carries offload hooks, which move weights in the middle of a call"
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{place} carries forward hooks, which a replay would not run"
        if module.training and _draws_or_learns(module):
            return f"{place} is in training mode"
    if any(parameter.device.type == "meta" for parameter in root.parameters()):
        return f"{type(root).__name__} has weights on the meta device"
    return None
