"""The tensors that a graph reads its inputs from, filled before each replay."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor


class StaticInputs:
    """A graph's own copy of each tensor of a call.

    A tensor that was copied before and has not changed since is not copied again: the prompt is the same tensor at
    every step. An inference tensor keeps no count of its changes and is copied every time, as is one that the captured
    call writes into.
    """

    def __init__(self, leaves: list[Any], device: torch.device) -> None:
        """Make a tensor on `device` for each tensor among `leaves`, with its strides and values."""
        self.static = [_own(leaf, device) for leaf in leaves]
        self._made = [_version(tensor) for tensor in self.static]
        self._written: set[int] = set()
        self._held: dict[int, tuple[weakref.ref[Tensor], int]] = {}

    def captured(self) -> None:
        """The call was captured, which ran it once on these tensors: note which of them it writes into."""
        self._written = {index for index, made in enumerate(self._made) if _version(self.static[index]) != made}

    def fill(self, leaves: list[Any]) -> None:
        """Copy the tensors of a call, but for those whose values are there already."""
        for index, (target, source) in enumerate(zip(self.static, leaves, strict=True)):
            if not isinstance(target, Tensor) or self._is_there(index, source):
                continue
            _distinct(target).copy_(_distinct(source), non_blocking=True)
            version = _version(source)
            if version is not None and index not in self._written:
                self._held[index] = (weakref.ref(source), version)

    def _is_there(self, index: int, source: Tensor) -> bool:
        held = self._held.get(index)
        return held is not None and held[0]() is source and held[1] == _version(source)

    def clear(self) -> None:
        """Let go of all tensors."""
        self.static.clear()
        self._held.clear()


def _own(leaf: Any, device: torch.device) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    made = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=device)
    _distinct(made).copy_(_distinct(leaf))
    return made


def _version(leaf: Any) -> int | None:
    """How often a tensor was written to; None where nobody counts."""
    return leaf._version if isinstance(leaf, Tensor) and not leaf.is_inference() else None


def _distinct(tensor: Tensor) -> Tensor:
    """A view of an expanded tensor without the repetitions, which cannot be written to."""
    if 0 in tensor.stride():
        for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
            if stride == 0 and size > 1:
                tensor = tensor.narrow(dim, 0, 1)
    return tensor
