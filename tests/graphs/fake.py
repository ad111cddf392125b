"""A capture without a GPU that bakes in what a CUDA graph bakes in: addresses of weights and every Python number."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


class _Recorder(TorchDispatchMode):
    """Writes down every operator with its arguments, tensors made meanwhile by number, others by their address."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[tuple[Any, Any, Any, list[int]]] = []
        self.numbers: dict[int, int] = {}
        self.kept: list[Any] = []
        self.outside: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        recorded = tree_map(self.named, (args, kwargs or {}))
        result = func(*args, **(kwargs or {}))
        made = []
        for leaf in tree_leaves(result):
            self.kept.append(leaf)  # so that no id is given out twice
            made.append(self.numbers.setdefault(id(leaf), len(self.numbers)) if isinstance(leaf, Tensor) else -1)
        self.operators.append((func, *recorded, made))
        return result

    def named(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) in self.numbers:
            return _Made(self.numbers[id(leaf)])
        self.kept.append(leaf)
        # an alias: values changed in place are seen, an exchanged `data` is not
        return self.outside.setdefault(id(leaf), leaf.detach())


class _Made:
    def __init__(self, number: int) -> None:
        self.number = number


def _filled(recorded: Any, values: dict[int, Tensor]) -> Any:
    """Arguments with the tensors made meanwhile in their places; `tree_map` knows more and takes longer than a run."""
    if isinstance(recorded, _Made):
        return values[recorded.number]
    if isinstance(recorded, (list, tuple)):
        return type(recorded)(_filled(item, values) for item in recorded)
    if isinstance(recorded, dict):
        return {name: _filled(item, values) for name, item in recorded.items()}
    return recorded


class FakeCapture:
    """Records the operators that a run calls and calls them again, on the weights that lay there then."""

    made = 0
    alive = 0

    def __init__(self, run: Callable[[], Any], device: torch.device) -> None:
        recorder = _Recorder()
        with recorder:
            self.output = run()
        self.operators = recorder.operators
        self.results = [
            (leaf, recorder.numbers.get(id(leaf))) for leaf in tree_leaves(self.output) if isinstance(leaf, Tensor)
        ]
        self.released = False
        FakeCapture.made += 1
        FakeCapture.alive += 1

    def in_turn(self) -> AbstractContextManager[None]:
        return nullcontext()

    def replay(self) -> None:
        assert not self.released, "a released graph was replayed"
        values: dict[int, Tensor] = {}
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            for func, args, kwargs, made in self.operators:
                result = func(*_filled(args, values), **_filled(kwargs, values))
                leaves = [result] if isinstance(result, Tensor) else tree_leaves(result)
                for number, leaf in zip(made, leaves, strict=True):
                    if number >= 0:
                        values[number] = leaf
            for target, number in self.results:
                if number is not None:
                    target.copy_(values[number])

    def release(self) -> None:
        assert not self.released, "released twice"
        self.released = True
        self.operators.clear()
        FakeCapture.alive -= 1
