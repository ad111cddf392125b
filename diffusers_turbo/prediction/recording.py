"""What a run does to memory, as a list of events: taken on the meta device once, replayed as often as one likes."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format
from torch.utils._python_dispatch import TorchDispatchMode

_aten: Any = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Made:
    """A storage of `size` bytes was made; `key` names it until it is gone."""

    key: int
    size: int


@dataclass(frozen=True, slots=True)
class Gone:
    """The last tensor on a storage was dropped."""

    key: int


@dataclass(frozen=True, slots=True)
class Convolved:
    """A convolution ran, in bytes; `copies_input`: its input had to be laid out anew, which the operator hides."""

    input: int
    output: int
    weight: int
    channels_last: bool
    copies_input: bool


@dataclass(frozen=True, slots=True)
class Multiplied:
    """A matrix product ran, for which cuBLAS keeps a workspace."""


@dataclass(frozen=True, slots=True)
class Entered:
    """The module of this path began its forward."""

    path: str


@dataclass(frozen=True, slots=True)
class Left:
    """The module of this path ended its forward."""

    path: str


Event = Made | Gone | Convolved | Multiplied | Entered | Left


@dataclass(frozen=True, kw_only=True)
class Recording:
    """The events of one stage. What it leaves behind lives on under the keys in `kept`.

    Attributes:
        events: in order.
        kept: keys of storages that outlive the stage.
        inputs: bytes of the tensors that the stage's networks were given, one tuple for each network.
        operators: how many operators ran.
        reasons: why parts of it are not a run but the closed-form estimate; empty where all of it ran.
        told: which switches could not be thrown for it, and why.
    """

    events: tuple[Event, ...]
    kept: tuple[int, ...] = ()
    inputs: tuple[tuple[int, ...], ...] = ()
    operators: int = 0
    reasons: tuple[str, ...] = ()
    told: tuple[str, ...] = ()


_PRODUCTS = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten.baddbmm.default,
    _aten.addbmm.default,
}


def _like_first(*operands: Any) -> Tensor | None:
    """A tensor like the operands, where they differ in nothing."""
    first: Tensor = operands[0]
    for other in operands[1:]:
        if not isinstance(other, Tensor) or other.shape != first.shape or other.dtype != first.dtype:
            return None
        if other.stride() != first.stride():
            return None
    return torch.empty_like(first)


def _product(left: Tensor, right: Tensor) -> Tensor:
    return left.new_empty(*left.shape[:-1], right.shape[-1])


def _normed(x: Tensor, shape: list[int], *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.numel() // math.prod(shape)
    mean, spread = (x.new_empty(rows, dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape), mean, spread


def _group_normed(x: Tensor, _weight: Any, _bias: Any, rows: int, _c: int, _hw: int, groups: int, _eps: float) -> Any:
    """Of what is contiguous, as `group_norm` hands it over off the CPU; another layout is left to the slow code."""
    if not x.is_contiguous():
        return None
    return torch.empty_like(x), x.new_empty(rows, groups), x.new_empty(rows, groups)


# Most of a network's operators, whose results are plain to see: the meta device's own code for them is slow Python.
_QUICK: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((_aten.add.Tensor, _aten.sub.Tensor, _aten.mul.Tensor, _aten.div.Tensor), _like_first),
    **dict.fromkeys((_aten.silu.default, _aten.gelu.default, _aten.sigmoid.default, _aten.tanh.default), _like_first),
    **dict.fromkeys((_aten.mm.default, _aten.bmm.default), _product),
    _aten.addmm.default: lambda bias, left, right: _product(left, right),
    _aten.native_layer_norm.default: _normed,
    _aten.native_group_norm.default: _group_normed,
}


@dataclass(eq=False)
class Again:
    """A tensor that repeated events make: the key of its storage among them, and what makes another."""

    key: int
    make_one: Callable[[], Tensor]
    made: Tensor | None = None

    def make(self) -> None:
        """Make it."""
        self.made = self.make_one()


class Recorder(TorchDispatchMode):
    """Writes down which storages operators make and when they go; those of the given modules count as weights.

    >>> with Recorder() as recorder:
    ...     total = (torch.zeros(1024, device="meta") + 1).sum()
    >>> [event.size for event in recorder.events if isinstance(event, Made)]
    [4096, 4096, 4]
    """

    def __init__(self, weights: Iterable[nn.Module] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.events: list[Event] = []
        self.operators = 0
        self._open = True
        self._known: dict[int, weakref.ref[torch.UntypedStorage] | None] = {}
        self._keys: dict[int, int] = {}
        self._repeated: set[int] = set()
        for module in weights:
            for tensor in (*module.parameters(), *module.buffers()):
                self._known[tensor.untyped_storage()._cdata] = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and write down what it made."""
        result = None
        if (quick := _QUICK.get(func)) is not None and args[0].device.type == "meta":
            result = quick(*args)
        if result is None:
            result = func(*args, **(kwargs or {}))
        convolves = func is _aten.convolution.default
        if convolves and _asks_for_last(args[0], args[1]):
            # the meta device answers in another layout
            result = result.contiguous(memory_format=torch.channels_last)
        self.operators += 1
        if isinstance(result, Tensor):
            self._see(result)
        elif isinstance(result, (tuple, list)):
            for item in result:
                if isinstance(item, Tensor):
                    self._see(item)
        if func in _PRODUCTS:
            self.events.append(Multiplied())
        elif convolves:
            self.events.append(_convolved(args[0], args[1], result))
        elif func is _aten._safe_softmax.default:
            # which scores are -inf, a byte each (aten/src/ATen/native/SoftMax.cpp)
            self.give_back(self.borrow(args[0].numel()))
        return result

    def repeat(self, events: Sequence[Event], *, keep: bool, result: Again | None = None) -> list[int]:
        """Write events down once more, for a second run that would be the same; return the keys they leave behind.

        What they leave behind is left behind again with `keep`, and not made without, but for a result.
        """
        ended = {event.key for event in events if isinstance(event, Gone)}
        keys: dict[int, int] = {}
        for event in events:
            if isinstance(event, Made):
                if result is not None and event.key == result.key:
                    result.make()
                elif keep or event.key in ended:
                    keys[event.key] = self.borrow(event.size)
            elif isinstance(event, Gone):
                if event.key in keys:
                    self.give_back(keys.pop(event.key))
            else:
                self.events.append(event)
        self._repeated.update(keys.values())
        return list(keys.values())

    def key_of(self, tensor: Tensor) -> int | None:
        """Return the key of a tensor's storage; None where it is a part of one, or there before."""
        storage = tensor.untyped_storage()
        return self._keys.get(storage._cdata) if storage.nbytes() == tensor.nbytes else None

    def borrow(self, size: int) -> int:
        """Write down a storage that no tensor stands for; return its key."""
        key = len(self.events)
        self.events.append(Made(key, size))
        return key

    def give_back(self, key: int) -> None:
        """Write down that a borrowed storage is gone."""
        self._repeated.discard(key)
        self.events.append(Gone(key))

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        identity = storage._cdata
        if identity in self._known or not storage.nbytes():
            return
        key = self.borrow(storage.nbytes())
        self._keys[identity] = key

        def gone(_: Any) -> None:
            del self._known[identity], self._keys[identity]
            if self._open:
                self.give_back(key)

        self._known[identity] = weakref.ref(storage, gone)

    def close(self) -> tuple[int, ...]:
        """Write nothing more down; return the keys of the storages that are still there."""
        self._open = False
        return tuple(sorted((*self._keys.values(), *self._repeated)))


def _convolved(image: Tensor, weight: Tensor, result: Tensor) -> Convolved:
    wants_last = _asks_for_last(image, weight)
    return Convolved(
        input=image.nbytes,
        output=result.nbytes,
        weight=weight.nbytes,
        channels_last=wants_last,
        copies_input=not image.is_contiguous(
            memory_format=torch.channels_last if wants_last else torch.contiguous_format
        ),
    )


def _asks_for_last(image: Tensor, weight: Tensor) -> bool:
    """Whether cuDNN works in channels-last: where weight or input is laid out so (aten/src/ATen/native/ConvUtils.h).

    A VAE's attention leaves its pictures in channels-last, but for a single one: the stride of a dimension of one is
    then that of another, by which PyTorch does not know the layout. The meta device writes strides that it would know.
    """
    if suggest_memory_format(weight) is torch.channels_last:
        return True
    return len(image) > 1 and suggest_memory_format(image) is torch.channels_last


@dataclass
class Marks:
    """Hooks on modules that write down when each begins and ends; what they write to is set for each recording."""

    recorder: Recorder | None = None
    handles: list[Any] = field(default_factory=list)

    def put_on(self, module: nn.Module, path: str) -> None:
        """Have a module's forward written down under `path`."""

        def entered(*_: Any) -> None:
            self.write(Entered(path))

        def left(*_: Any) -> None:
            self.write(Left(path))

        self.handles += [module.register_forward_pre_hook(entered), module.register_forward_hook(left)]

    def write(self, event: Event) -> None:
        """Write an event down if something is being recorded."""
        if self.recorder is not None:
            self.recorder.events.append(event)

    @contextmanager
    def to(self, recorder: Recorder) -> Iterator[None]:
        """Write to `recorder` inside the block."""
        self.recorder = recorder
        try:
            yield
        finally:
            self.recorder = None
