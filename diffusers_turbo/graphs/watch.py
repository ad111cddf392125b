"""When a graph is out of date: the addresses of weights and the plain numbers that it baked in have changed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..modules import modules_in, moves_unrecorded

NUMBERS = ("scaling", "_active_adapter", "_disable_adapters", "merged_adapters", "s1", "s2", "b1", "b2")
"""Attributes of modules that change what they compute: of peft's LoRA layers (peft.tuners.lora.layer) and FreeU's
(diffusers.utils.torch_utils.apply_freeu)."""

OUTPUT_CAPTURING = "transformers.utils.output_capturing"
"""Where the hooks come from that collect a text encoder's hidden states."""

_WATCHED = frozenset((*NUMBERS, "processor"))

_SHAPE, _DTYPE = attrgetter("shape"), attrgetter("dtype")

_ID = object.__hash__
"""Tells objects by their addresses, as `id` does; but `id` calls every audit hook, and filelock adds one in Python."""


class Watch:
    """A module tree as a graph saw it; objects are named by weak references, or by the ids of what is there still.

    `seen` is what there was to see; another object after each change. `moved` says that the last one was of addresses
    only.
    `changed` looks at all of it once a call of the pipeline: 1 to 2 ms for SD1.5's UNet, 4 to 7 for
    SDXL's, on one slow core.
    `numbers` reads what a callback may change between two steps: 33 and 144 microseconds there.
    """

    def __init__(self, root: nn.Module) -> None:
        """Take the tree down."""
        self.root = root
        self.moved = False
        self._take()

    def changed(self) -> bool:
        """Whether a graph is out of date: other modules, addresses, hooks or training flags than last time."""
        modules = [module() for module in self._modules]
        now = None if None in modules else _look(modules)
        if now == self.seen:
            return False
        before = self.seen
        self._take()
        self.moved = now is not None and now.what == before.what and now.addresses != before.addresses
        return now is None or now.what != before.what or self.moved

    def _take(self) -> None:
        modules = modules_in(self.root)
        self._modules = list(map(weakref.ref, modules))
        self._numbers = Numbers(modules)
        self.seen = _look(modules)

    def numbers(self) -> tuple[Any, ...]:
        """Return the plain numbers and the processors in force."""
        return self._numbers.now()


class Numbers:
    """What some modules compute with beside their weights: plain numbers and processors."""

    def __init__(self, modules: list[nn.Module]) -> None:
        """Find who has any."""
        self._holders: list[tuple[dict[str, Any], tuple[str, ...]]] = []
        for module in modules:
            state = vars(module)
            names = _WATCHED.intersection(state)
            if "processor" in state["_modules"]:  # one with weights is a module
                names |= {"processor"}
            if names:
                self._holders.append((state, tuple(sorted(names))))

    def now(self) -> tuple[Any, ...]:
        """Return them as they are."""
        found: list[Any] = []
        for state, names in self._holders:
            for name in names:
                value = state.get(name, state["_modules"].get(name))
                found += (_named(value), repr(getattr(value, "scale", None))) if name == "processor" else (repr(value),)
        return tuple(found)


class _Seen(NamedTuple):
    """What modules were like: `attributes` of each are counted, since a new one may be one to watch."""

    attributes: list[int]
    what: tuple[list[Any], ...]
    addresses: list[int]


def _look(modules: list[Any]) -> _Seen:
    """Look at all modules, one kind of thing after the other: loops that Python need not run itself."""
    states = list(map(vars, modules))
    tables = [table for state in states for table in (state["_parameters"], state["_buffers"]) if table]
    tensors = [x for table in tables for x in table.values() if x is not None]
    what = (
        [_ID(child) for state in states if state["_modules"] for child in state["_modules"].values()],
        [
            hook
            for state in states
            if state["_forward_hooks"] or state["_forward_pre_hooks"]
            for hook in _hooks_of(state)
        ],
        [state["training"] for state in states],
        [_named(state["forward"]) for state in states if "forward" in state],
        list(map(Tensor.stride, tensors)),
        list(map(_SHAPE, tensors)),
        list(map(_DTYPE, tensors)),
    )
    # an address that was freed comes back, and then under another shape
    return _Seen(list(map(len, states)), what, list(map(Tensor.data_ptr, tensors)))


def _hooks_of(state: Mapping[str, Any]) -> tuple[int, ...]:
    """Return by their numbers the forward hooks of a module that a replay would have to run.

    Those of transformers note hidden states for the model that they belong to, and only while it runs: all of which is
    in the capture of that model (transformers.utils.output_capturing).
    """
    hooks = (*state["_forward_hooks"].items(), *state["_forward_pre_hooks"].items())
    return tuple(number for number, hook in hooks if getattr(hook, "__module__", None) != OUTPUT_CAPTURING)


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


def why_not_capturable(*roots: nn.Module, moves: Callable[[nn.Module], bool] = moves_unrecorded) -> str | None:
    """Return why calls of some modules must not be captured, None when they may be; `moves` tells of hooks."""
    modules = modules_in(*roots)
    for module in modules:
        if reason := _why_not_capturable(module, moves):
            return f"{_name_of(module, roots)} {reason}"
    for module in modules:
        if any(weight is not None and weight.is_meta for weight in module._parameters.values()):
            return f"{_name_of(module, roots)} has weights on the meta device"
    return None


def _name_of(module: nn.Module, roots: Sequence[nn.Module]) -> str:
    """Return a module's name in the first of some trees that has it, after the class of its root."""
    root, name = next((root, name) for root in roots for name, other in root.named_modules() if other is module)
    return f"{type(root).__name__}.{name}" if name else type(root).__name__


def _why_not_capturable(module: nn.Module, moves: Callable[[nn.Module], bool]) -> str | None:
    if moves(module):
        return "carries offload hooks, which move weights in the middle of a call"
    state = vars(module)
    if (state["_forward_hooks"] or state["_forward_pre_hooks"]) and _hooks_of(state):
        return "carries forward hooks, which a replay would not run"
    return "is in training mode" if module.training and _draws_or_learns(module) else None
