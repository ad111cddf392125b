"""When a graph is out of date: the addresses of weights and the plain numbers that it baked in have changed."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

NUMBERS = ("scaling", "_active_adapter", "_disable_adapters", "merged_adapters", "s1", "s2", "b1", "b2")
"""Attributes of modules that change what they compute: of peft's LoRA layers (peft.tuners.lora.layer) and FreeU's
(diffusers.utils.torch_utils.apply_freeu)."""

_WATCHED = frozenset((*NUMBERS, "processor"))

HOOKS = ("_hf_hook", "_diffusers_hook")
"""Where accelerate and diffusers hang hooks that move weights or run Python in the middle of a call."""


class Watch:
    """A module tree as a graph saw it.

    `take` walks all of it once a call of the pipeline: 1.8 ms for SD1.5's UNet, 6 to 10 for SDXL's, on one slow core.
    `numbers` reads what a callback may change between two steps: 33 and 144 microseconds there. Both name objects by
    weak references, since ids come back.
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
        # nn.Module.modules() makes a dotted name for each one on the way, which is most of its time
        waiting: list[nn.Module] = [self.root]
        while waiting:
            module = waiting.pop()
            state = vars(module)
            children = state["_modules"]
            waiting += [child for child in children.values() if child is not None]
            found += (weakref.ref(module), state["training"], _named(state.get("forward")))
            found += (len(state["_forward_hooks"]), len(state["_forward_pre_hooks"]))
            for table in (state["_parameters"], state["_buffers"]):
                for tensor in table.values():
                    if tensor is not None:
                        # an address that was freed comes back, and then under another shape
                        found += (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            names = _WATCHED.intersection(state)
            if "processor" in children:  # one with weights is a module
                names |= {"processor"}
            if names:
                self._holders.append((state, tuple(sorted(names))))
        return tuple(found)

    def numbers(self) -> tuple[Any, ...]:
        """Return the plain numbers and the processors in force."""
        found: list[Any] = []
        for state, names in self._holders:
            for name in names:
                value = state.get(name, state["_modules"].get(name))
                found += (_named(value), repr(getattr(value, "scale", None))) if name == "processor" else (repr(value),)
        return tuple(found)


def _draws_or_learns(module: nn.Module) -> bool:
    """Whether training mode matters to a module; adapters' layers are left in it and do not care."""
    dropout = isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
    return dropout or isinstance(module, nn.modules.batchnorm._BatchNorm)


def _named(value: object) -> object:
    """A name of an object that no other object ever gets; compares by identity as long as it lives."""
    if value is None:
        return None
    try:
        return weakref.ref(value)
    except TypeError:  # of a type without weak references: kept as it is
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
