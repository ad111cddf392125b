"""Calls like earlier ones of a recording, written down again instead of run: a picture has many tiles of few shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from inspect import ismethod
from typing import Any
from weakref import WeakMethod

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from ..actions.calls import COMPILED
from ..actions.tiled_calls import ExactHalf
from ..tiling.halves import tiled_layers
from .recording import Again, Event, Marks, Recorder


@dataclass(frozen=True)
class _Seen:
    """What a call wrote down.

    Attributes:
        events: in order.
        key: of its result's storage.
        like: a tensor like its result.
        error: what it ended in instead.
        forwards: the norms' own in that call, of which one may have ended it with what it wanted.
    """

    events: tuple[Event, ...]
    key: int | None = None
    like: Tensor | None = None
    error: type[Exception] | None = None
    forwards: tuple[WeakMethod[Any] | None, ...] = ()

    def ended_by(self, forwards: tuple[Any, ...]) -> bool:
        """Whether these forwards are those that ended it."""
        then = [forward and forward() for forward in self.forwards]
        return all(a == b for a, b in zip(then, forwards, strict=True))


@dataclass(eq=False)
class SameAgain:
    """Stands in for a module's forward: a call like an earlier one of the same recording is written down, not run.

    A picture is decoded in many tiles of few shapes, to be measured and to be shown: its `norms` run other forwards
    then, of which some end the call.
    """

    run: Callable[..., Any]
    marks: Marks
    norms: tuple[nn.Module, ...] = ()
    _seen: dict[Any, _Seen] = field(default_factory=dict)
    _of: Recorder | None = None

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the forward, or repeat what it wrote down."""
        if self.marks.recorder is None or any(value is not None for value in (*args, *kwargs.values())):
            return self.run(x, *args, **kwargs)
        forwards = tuple(vars(norm).get("forward") for norm in self.norms)
        names = tuple(getattr(forward, "__name__", "") for forward in forwards)
        return self._once(self.marks.recorder, (_layout(x), names), forwards, partial(self.run, x, *args, **kwargs))

    def _once(self, recorder: Recorder, place: Any, forwards: tuple[Any, ...], call: Callable[[], Any]) -> Any:
        """Make a call that is like all others of its place, or repeat what the first of them wrote down."""
        if recorder is not self._of:
            self._of, self._seen = recorder, {}
        seen = self._seen.get(place)
        if seen is not None and (seen.error is None or seen.ended_by(forwards)):
            return self._again(recorder, seen)
        start = len(recorder.events)
        try:
            result = call()
        except Exception as error:
            weak = tuple(WeakMethod(forward) if ismethod(forward) else None for forward in forwards)
            self._seen[place] = _Seen(tuple(recorder.events[start:]), error=type(error), forwards=weak)
            raise
        key = recorder.key_of(result) if isinstance(result, Tensor) else None
        if key is not None and key >= start:
            with _disable_current_modes():
                like = torch.empty_strided(result.shape, result.stride(), dtype=result.dtype, device="meta")
            self._seen[place] = _Seen(tuple(recorder.events[start:]), key, like)
        return result

    def _again(self, recorder: Recorder, seen: _Seen) -> Any:
        if seen.error is not None:
            # what the frames held until it was caught
            for key in recorder.repeat(seen.events, keep=True):
                recorder.give_back(key)
            raise seen.error
        assert seen.key is not None
        assert seen.like is not None
        result = Again(seen.key, partial(torch.empty_like, seen.like))
        recorder.repeat(seen.events, keep=False, result=result)
        return result.made


@dataclass(eq=False)
class SameInRow(SameAgain):
    """Stands in for a call that is made of a batch's parts one after the other, whose results wait in one place.

    From the third on no call needs more memory than the one before it, but for what waits: only its result is made.
    """

    in_tuple: bool = False
    _repeated: Recorder | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Make the call, or repeat what it wrote down; in a recording it answers one tensor, perhaps in a tuple."""
        if self.marks.recorder is None:
            return self.run(*args, **kwargs)
        place = tuple(_layout(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        result = self._once(self.marks.recorder, place, (), lambda: self._tensor(self.run(*args, **kwargs)))
        return (result,) if self.in_tuple else result

    def _tensor(self, result: Any) -> Tensor:
        tensor: Tensor = result[0] if self.in_tuple else result
        return tensor

    def _again(self, recorder: Recorder, seen: _Seen) -> Any:
        if self._repeated is recorder and seen.like is not None:
            return torch.empty_like(seen.like)
        self._repeated = recorder
        return super()._again(recorder, seen)


def _layout(x: Tensor) -> tuple[Any, ...]:
    return x.shape, x.stride(), x.dtype


def shorten_slices(denoiser: nn.Module, marks: Marks) -> None:
    """Have slices of one shape run once."""
    vars(denoiser)[COMPILED] = SameInRow(denoiser._call_impl, marks, in_tuple=True)


def shorten_pictures(vae: Any, marks: Marks) -> None:
    """Have pictures of one shape run once, where exact tiles take them one after the other."""
    for name, method in (("tiled_decode", "_decode"), ("_tiled_encode", "_encode")):
        half = vars(vae).get(name)
        if isinstance(half, ExactHalf) and method not in vars(half):  # tiles that stay on are met at each stage
            setattr(half, method, SameInRow(getattr(half, method), marks))


def shorten(vae: nn.Module, marks: Marks) -> None:
    """Have tiles of one shape run once, and leave their borders unblended: that goes row by row, in place."""
    for half in (getattr(vae, name, None) for name in ("encoder", "decoder")):
        if isinstance(half, nn.Module):
            for part in (half, *tiled_layers(half)):
                norms = tuple(module for module in part.modules() if isinstance(module, nn.GroupNorm))
                part.forward = SameAgain(part.forward, marks, norms)
    for name in ("blend_v", "blend_h"):
        if callable(getattr(vae, name, None)):
            vars(vae)[name] = lambda above, tile, extent: tile
