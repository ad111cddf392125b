"""Weights on their way: what moves together, and a window on the device that groups of it pass through.

The window is two buffers, made once: while one group works in the first, the next is copied into the second on a stream
of its own. Events order the two streams on the device, so that the host waits for nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..graphs.capture import is_recording
from ..planning.residents import aligned

HOST = torch.device("cpu")


@dataclass(eq=False)
class Unit:
    """A module that works with all of its weights at once."""

    module: nn.Module
    tensors: tuple[Tensor, ...]

    @property
    def size(self) -> int:
        """Bytes in a buffer."""
        return sum(aligned(extent(tensor)) for tensor in self.tensors)


@dataclass(eq=False)
class Group:
    """Units that are streamed together."""

    units: tuple[Unit, ...]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The weights of its units."""
        return tuple(tensor for unit in self.units for tensor in unit.tensors)

    @property
    def size(self) -> int:
        """Bytes in a buffer."""
        return sum(unit.size for unit in self.units)


def extent(tensor: Tensor) -> int:
    """Return the bytes from a tensor's first element to its last, whatever its strides."""
    if not tensor.numel():
        return 0
    last = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return int((last + 1) * tensor.element_size())


def placed(buffer: Tensor, start: int, like: Tensor) -> Tensor:
    """Return a tensor of the shape, strides and dtype of `like` in a buffer of bytes."""
    piece = buffer[start : start + extent(like)].view(like.dtype)
    return piece.as_strided(like.shape, like.stride())


def weights_of(module: nn.Module) -> list[Tensor]:
    """Return a module's parameters and buffers, each once."""
    return list(dict.fromkeys([*module.parameters(), *module.buffers()]))


def _own(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


def units_of(roots: dict[str, nn.Module]) -> tuple[list[Unit], tuple[Tensor, ...]]:
    """Find the layers that work with their own weights; return them, and the weights of all other modules."""
    units: list[Unit] = []
    seen: set[nn.Module] = set()

    def look(module: nn.Module) -> None:
        if module in seen:
            return
        seen.add(module)
        below = [child for child in module.children() if weights_of(child)]
        # torch's own layers reach into their children (multi-head attention), others call them
        whole = not below or type(module).__module__.startswith("torch.nn")
        called = type(module).forward is not nn.Module.forward and module not in roots.values()
        if _own(module) and whole and called:
            units.append(Unit(module, tuple(weights_of(module))))
            seen.update(module.modules())
            return
        for child in module.children():
            look(child)

    for root in roots.values():
        look(root)
    holders: dict[Any, list[Unit]] = {}
    for unit in units:
        for tensor in unit.tensors:
            holders.setdefault(tensor.data_ptr() or id(tensor), []).append(unit)
    tied = {unit for sharing in holders.values() if len(sharing) > 1 for unit in sharing}
    units = [unit for unit in units if unit not in tied]
    moving = {id(tensor) for unit in units for tensor in unit.tensors}
    fixed = [tensor for root in roots.values() for tensor in weights_of(root) if id(tensor) not in moving]
    return units, tuple(dict.fromkeys(fixed))


@torch.inference_mode(False)
def bring(tensors: Iterable[Tensor], device: torch.device) -> None:
    """Move weights, keeping their objects."""
    for tensor in tensors:
        tensor.data = tensor.data.to(device)


class Loan:
    """Weights that are on the device for a while.

    A faithful one keeps their homes, the memory of the host that they came from, and going back copies nothing where
    nothing was changed. Nobody may then change them but by way of the parameter, which its version tells.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._away: dict[Tensor, tuple[Tensor, int, int] | None] = {}

    @torch.inference_mode(False)
    def bring(self, tensors: Iterable[Tensor], *, faithful: bool) -> None:
        """Bring weights, keeping their objects; what is there already stays."""
        for tensor in tensors:
            if tensor not in self._away:
                home = tensor.data
                tensor.data = self._copied(home)
                known = faithful and home.device.type == HOST.type
                self._away[tensor] = (home, tensor.data_ptr(), _version(tensor)) if known else None

    @torch.inference_mode(False)
    def end(self) -> None:
        """Send all of them home."""
        for tensor, known in self._away.items():
            tensor.data = tensor.data.to(HOST) if known is None else _at_home(tensor, *known)
        self._away.clear()

    def forget(self) -> None:
        """Let somebody else say where they go."""
        self._away.clear()

    def _copied(self, home: Tensor) -> Tensor:
        return home.to(self.device, non_blocking=home.is_pinned())


def _at_home(tensor: Tensor, home: Tensor, copy: int, version: int) -> Tensor:
    """Return a tensor's home with the values of now."""
    now = tensor.data
    if (now.shape, now.stride(), now.dtype) != (home.shape, home.stride(), home.dtype):
        return now.to(HOST)
    if now.data_ptr() != copy or _version(tensor) != version:
        home.copy_(now)
    return home


@dataclass(eq=False)
class _Slot:
    """One buffer of the window: what it holds, as it was when it was copied, and when which stream is done with it."""

    buffer: Tensor
    copied: Any = None
    worked: Any = None
    group: Group | None = None
    versions: tuple[int, ...] = ()
    views: dict[Group, tuple[Tensor, ...]] = field(default_factory=dict)


class Window:
    """Room on the device for the streamed group that works and the one that comes.

    Args:
        device: where they work.
        sizes: bytes of its buffers, each of which holds any group; with one of them nothing comes ahead.
    """

    @torch.inference_mode(False)
    def __init__(self, device: torch.device, sizes: Sequence[int]) -> None:
        self.streams = torch.get_device_module(device) if device.type not in ("cpu", "mps") else None
        self.stream = self.streams.Stream(device) if self.streams is not None else None
        self.device = device
        self._slots = [_Slot(torch.empty(size, dtype=torch.uint8, device=device)) for size in sizes]
        self._working: _Slot | None = None
        self._homes: tuple[Tensor, ...] = ()
        self.recording = False
        for slot in self._slots:
            slot.worked = self._mark()

    @property
    def working(self) -> Group | None:
        """The group whose weights are those on the device."""
        return self._working.group if self._working is not None else None

    @torch.inference_mode(False)
    def enter(self, group: Group) -> None:
        """Have a group work from the window, after the one before; fetched ahead it needs no copy."""
        self.leave()
        slot = self._fetched(group)
        self._wait(slot.copied)
        tensors = group.tensors
        self._homes = tuple(tensor.data for tensor in tensors)
        for tensor, view in zip(tensors, slot.views[group], strict=True):
            tensor.data = view
        self._working = slot

    @torch.inference_mode(False)
    def fetch(self, group: Group) -> None:
        """Copy a group in ahead of time, beside the one that works; there already, nothing happens."""
        if len(self._slots) > 1 or self._working is None:
            self._fetched(group)

    @torch.inference_mode(False)
    def leave(self) -> None:
        """Let the weights of the group that works be those in host memory again."""
        slot, self._working = self._working, None
        if slot is None or slot.group is None:
            return
        for tensor, home, view in zip(slot.group.tensors, self._homes, slot.views[slot.group], strict=True):
            # what was put in its place meanwhile stays
            if tensor.data_ptr() == view.data_ptr():
                tensor.data = home
        self._homes = ()
        slot.worked = self._mark()

    def begin(self) -> None:
        """Begin a forward: let go of copies of weights that were changed since, and of what is no copy."""
        self.leave()
        if is_recording(self.device):
            self._begin_recording()
        elif self.recording:  # which failed: its events are nobody's
            self.settle()
        else:
            self._forget_changed()

    def _begin_recording(self) -> None:
        """Hold nothing, and have copies wait for what was recorded so far: with that they are recorded, too."""
        begun = self._mark()
        if self.stream is not None:
            self.stream.wait_event(begun)
        self.recording = True
        for slot in self._slots:
            slot.group, slot.copied, slot.worked = None, None, begun

    def _forget_changed(self) -> None:
        for slot in self._slots:
            if slot.group is not None and slot.versions != _versions(slot.group):
                slot.group = None

    def settle(self) -> None:
        """Hold nothing; what comes on the current stream waits for copies under way."""
        self.leave()
        self.recording = False
        if self.stream is not None and self.streams is not None:
            self.streams.current_stream(self.device).wait_stream(self.stream)
        for slot in self._slots:
            slot.group, slot.copied, slot.worked = None, None, None

    def close(self) -> None:
        """Give the room back, once no copy is under way."""
        self.leave()
        if self.streams is not None:
            self.streams.synchronize(self.device)  # of replays, too, which no stream of ours tells
        self._slots.clear()

    def _fetched(self, group: Group) -> _Slot:
        found = next((slot for slot in self._slots if slot.group is group), None)
        if found is not None:
            return found
        free = [slot for slot in self._slots if slot is not self._working]
        slot = next((slot for slot in free if slot.group is None), free[0])
        if group not in slot.views:
            slot.views[group] = _views(slot.buffer, group.tensors)
        if slot.worked is None:  # since it was settled
            slot.worked = self._mark()
        with self.streams.stream(self.stream) if self.streams is not None else nullcontext():
            self._wait(slot.worked)
            for tensor, view in zip(group.tensors, slot.views[group], strict=True):
                view.copy_(tensor.data, non_blocking=True)
            slot.copied = self._mark()
        slot.group, slot.versions = group, _versions(group)
        return slot

    def _mark(self) -> Any:
        """Return an event of the stream that is current; None where there are no streams."""
        if self.streams is None:
            return None
        event = self.streams.Event()
        event.record(self.streams.current_stream(self.device))
        return event

    def _wait(self, event: Any) -> None:
        if self.streams is not None and event is not None:
            self.streams.current_stream(self.device).wait_event(event)


def _views(buffer: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    found, start = [], 0
    for tensor in tensors:
        found.append(placed(buffer, start, tensor))
        start += aligned(extent(tensor))
    return tuple(found)


def _versions(group: Group) -> tuple[int, ...]:
    return tuple(map(_version, group.tensors))


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
