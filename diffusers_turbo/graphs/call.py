"""A module's call under graphs: first sight of a signature runs eagerly, the second captures, the rest replay."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten

from ..errors import in_one_line
from ..modules import bring_of, device_of, end_of, hooked_in, moves_unrecorded
from .capture import CAPTURES, Capture, is_recording, return_cached
from .inputs import StaticInputs
from .signature import MODE, Signature, flatten, signature_of, unflatten
from .watch import Watch, why_not_capturable

REMEMBERED = 64
"""Signatures whose first sight is remembered."""


@dataclass
class Graph:
    """A capture with the tensors it reads from, and the structure of what it returns."""

    capture: Capture
    inputs: StaticInputs
    outputs: list[Any]
    structure: TreeSpec

    def run(self, leaves: list[Any]) -> Any:
        """Replay on new inputs; the results are copies, safe to keep."""
        with self.capture.in_turn():
            self.inputs.fill(leaves)
            self.capture.replay()
            results = [x.clone() if isinstance(x, Tensor) else x for x in self.outputs]
        return unflatten(results, self.structure)

    def release(self) -> None:
        """Let go of the tensors first, so that the capture can give their memory back."""
        self.inputs.clear()
        self.outputs.clear()
        self.capture.release()


class GraphedCall:
    """Stands where `nn.Module` keeps its compiled call, over the module's own (or compiled) call."""

    def __init__(
        self, module: nn.Module, inner: Callable[..., Any], max_graphs: int, owner: nn.Module | None = None
    ) -> None:
        """Make the call of a module.

        Args:
            module: whose call it is; for a function beside that, the list of all modules it computes with.
            inner: what computes it: the compiled call, `module._call_impl`, or that function.
            max_graphs: how many captures to keep; the least recently used goes first.
            owner: the component that it is a part of, whose offload moves its weights.
        """
        self.module, self.inner, self.max_graphs, self.owner = module, inner, max_graphs, owner
        self.device = device_of(module)
        self.graphs: OrderedDict[Signature, Graph] = OrderedDict()
        self.captured = self.replayed = self.eager = 0
        self.reason: str | None = None
        self._seen: OrderedDict[Signature, None] = OrderedDict()
        self._refused: set[Signature] = set()
        self._failures: dict[Signature, str] = {}
        self._lock = threading.RLock()
        self._watch: Watch | None = None
        self._numbers: tuple[Any, ...] = ()
        self._checked = False
        self._calls_inside = 0

    def enter_call(self, pipe: Any = None) -> None:
        """A call of the pipeline begins: the next call of the module looks at all of it again."""
        with self._lock:
            self._calls_inside += 1
            self._checked = False

    def leave_call(self) -> None:
        """A call of the pipeline ends."""
        with self._lock:
            self._calls_inside -= 1
            self._checked = False

    def look(self) -> object:
        """Look at the module unless this call of the pipeline has; return another object after each change."""
        with self._lock:
            return self._looked().seen

    def look_again(self) -> None:
        """Have the next call of the module look at it again."""
        with self._lock:
            self._checked = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module: replay where a valid graph is there, else eagerly."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or is_recording(self.device):
            return self.inner(*args, **kwargs)
        with self._lock:
            if (bring := bring_of(self.module)) is not None:
                bring()
            return self._run(args, kwargs)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._refresh()
        leaves, structure = flatten(args, kwargs)
        key = None if self.reason else signature_of(leaves, structure, self.device, vars(self.module).get(MODE))
        if key is None or key in self._refused:
            return self._run_eagerly(args, kwargs)
        graph = self.graphs.get(key)
        if graph is None:
            if key not in self._seen:
                # also the warm-up: a capture needs all kernels chosen and compiled
                self._remember(key)
                return self._run_eagerly(args, kwargs)
            graph = self._capture(key, leaves, structure)
            if graph is None:
                return self._run_eagerly(args, kwargs)
        self.graphs.move_to_end(key)
        self.replayed += 1
        return graph.run(leaves)

    def _run_eagerly(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.eager += 1
        return self.inner(*args, **kwargs)

    def _refresh(self) -> None:
        """Drop the graphs if what they baked in has changed."""
        numbers = self._looked().numbers()
        if numbers != self._numbers:
            self._numbers = numbers
            self.clear()

    def _looked(self) -> Watch:
        """Return the watch over the modules; a first look in a call of the pipeline drops the graphs after a change."""
        if self._watch is None:
            self._watch, self.reason = Watch(self.module), self._why_not()
        elif not (self._checked and self._calls_inside) and self._watch.changed():
            self.reason = self._why_not()
            before, self.device = self.device, device_of(self.module)
            # moved weights have the kernels chosen already; unless they move at every other call, it is worth recording
            if self._watch.moved and self.device == before and self.replayed > 2 * self.captured:
                self.release()
            else:
                self.clear()
        elif self.reason and not (self._checked and self._calls_inside):
            self.reason = self._why_not()  # hooks that stay may let calls be recorded by now
        self._checked = True
        return self._watch

    def _why_not(self) -> str | None:
        """Return why calls must not be captured: for what hangs on the module, or on the component it is a part of."""
        part = self.owner is not None and self.owner is not self.module
        # what is streamed can only be recorded from the beginning of the component's call on
        if self.owner is not None and (moves_unrecorded(self.owner) or (part and hooked_in(self.module))):
            return f"its {type(self.owner).__name__} carries offload hooks, which move its weights between calls"
        return why_not_capturable(self.module)

    def _remember(self, key: Signature) -> None:
        self._seen[key] = None
        while len(self._seen) > REMEMBERED:
            self._seen.popitem(last=False)

    def _capture(self, key: Signature, leaves: list[Any], structure: TreeSpec) -> Graph | None:
        while len(self.graphs) >= self.max_graphs:
            _, oldest = self.graphs.popitem(last=False)
            oldest.release()
        # nothing that is cached goes back while a graph is recorded, nor the segment that an input of its own lies in
        return_cached(self.device)
        inputs = StaticInputs(leaves, self.device)

        def run() -> Any:
            args, kwargs = unflatten(inputs.static, structure)
            try:
                return self.inner(*args, **kwargs)
            except BaseException:
                # a recording that another stream takes part in can't be ended before that has come back
                if (end := end_of(self.module)) is not None:
                    with suppress(Exception):  # the first error is the one to tell of
                        end()
                raise

        try:
            capture = CAPTURES[self.device.type](run, self.device)
        except Exception as error:
            # whatever a call does that cannot be recorded; it runs as it would without graphs
            self._refused.add(key)
            self._failures[key] = in_one_line(error, 200)
            return None
        self._failures.pop(key, None)
        inputs.captured()
        outputs, output_structure = tree_flatten(capture.output)
        graph = self.graphs[key] = Graph(capture, inputs, outputs, output_structure)
        self.captured += 1
        return graph

    def release(self) -> None:
        """Give the memory of every graph back; what was seen is recorded at its next sight, or tried again."""
        with self._lock:
            for graph in self.graphs.values():
                graph.release()
            self.graphs.clear()
            self._refused.clear()

    def clear(self) -> None:
        """Release every graph and forget what was seen."""
        with self._lock:
            self.release()
            self._seen.clear()
            self._failures.clear()

    def tell(self) -> str:
        """Say whose graphs these are, and what happened so far."""
        return f"{type(self.module).__name__}: {self.told()}"

    def told(self) -> str:
        """Say what happened so far."""
        told = f"{self.captured} captured, {len(self.graphs)} kept, {self.replayed} replays"
        if self.reason:
            return f"{told}; runs eagerly: {self.reason}"
        failures = "; ".join(sorted(set(self._failures.values())))
        return f"{told}; could not be captured: {failures}" if failures else told
