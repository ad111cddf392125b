"""A call that computes something ahead of a network's own, once a call of the pipeline: the common part."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..graphs.call import GraphedCall
from ..modules import bring_of
from .calls import ScopedCallOver, calls_from
from .stripes import Forwards, State


class AheadCall(ABC):
    """Stands over a network's call, and acts while a call of the pipeline runs.

    Attributes:
        layers: those of the network that take what was computed ahead.
        calls, made: how often the network was called, and something computed ahead.
        graphs: what is computed ahead, recorded, where the network's own call is under graphs.
        reason: why nothing is computed ahead in this call of the pipeline, if so.
    """

    def __init__(self, root: nn.Module, inner: Callable[..., Any], forwards: Forwards) -> None:
        """Stand over `inner`, the call of `root`."""
        self.root, self.inner, self.forwards = root, inner, forwards
        self.layers: list[Any] = []
        self.calls = self.made = 0
        self.graphs: GraphedCall | None = None
        self.reason: str | None = None
        self.pipe: Any = None
        self._prepared = False
        self._seen: object = None
        self._state: State | None = None
        self._memory: tuple[tuple[Tensor, ...], Any, Tensor] | None = None

    @abstractmethod
    def find(self) -> list[Any]:
        """Return the network's layers that can take what is computed ahead."""

    @abstractmethod
    def carriers(self) -> list[nn.Module]:
        """Return the modules of `layers` that are to carry forwards, as they stand there now."""

    @abstractmethod
    def why_not(self, carriers: list[nn.Module], fresh: bool) -> str | None:
        """Return why nothing can be computed ahead; `fresh` says that the carriers carry nothing of ours yet."""

    @abstractmethod
    def lay(self) -> None:
        """Lay the forwards."""

    @abstractmethod
    def compute(self, *inputs: Tensor, **how: Any) -> Tensor:
        """Compute ahead; `how` is plain values. All else that it depends on are the modules that carry forwards."""

    @abstractmethod
    def replaced(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of a call, with what was computed ahead in place of what it was computed from."""

    def prepare(self) -> str | None:
        """Lay the forwards on the modules that stand in the network now; return why not, if that is so."""
        network = graphs_of(self.inner)
        seen = None if network is None else network.look()
        if seen is None or seen is not self._seen:
            self.layers, self._seen = self.find(), seen
        carriers = self.carriers()
        fresh = not self.forwards.are_on(carriers)
        before = self.forwards.laid
        if fresh:
            self.forwards.lift()
            self.release()
        reason = self.why_not(carriers, fresh)
        if fresh and reason is None:
            self.lay()
        if network is not None and fresh and (before or self.forwards.laid):
            network.look_again()  # these forwards are, or were, in its modules
        self._state = State(carriers) if reason is None else None
        self.reason = reason  # last: another thread may ask
        return reason

    def enter_call(self, pipe: Any) -> None:
        """A call of the pipeline begins; while the text encoders run, there is time to prepare."""
        self.pipe, self._prepared = pipe, False
        if (network := graphs_of(self.inner)) is not None:
            network.look_again()  # whose own scope may be entered later, while another thread takes a step

    def leave_call(self) -> None:
        """A call of the pipeline ends, and what was made for it goes."""
        self.pipe = self._memory = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network."""
        self.calls += 1
        if (bring := bring_of(self.root)) is not None:
            bring()  # what is computed ahead reads weights, too
        if self.pipe is not None and not torch.is_grad_enabled() and self._can():
            args, kwargs = self.replaced(args, kwargs)
        return self.inner(*args, **kwargs)

    def _can(self) -> bool:
        """Whether the layers take what is computed ahead."""
        if not self._prepared:
            self._prepared = True
            return self.prepare() is None
        # an adapter may have come or gone between two steps
        return self.reason is None and self.forwards.are_on(self.carriers())

    def once(self, *inputs: Tensor, **how: Any) -> Tensor:
        """Return what is computed of these, computed before if neither they nor the modules have changed since."""
        assert self._state is not None
        state = (*(x._version for x in inputs), *how.items(), *self._state.now())
        if (memory := self._memory) is not None:
            held_inputs, held_state, held = memory
            same = len(held_inputs) == len(inputs) and all(a is b for a, b in zip(held_inputs, inputs, strict=True))
            if same and held_state == state:
                return held
        made = self._computed(*inputs, **how)
        self._memory = (inputs, state, made)
        self.made += 1
        return made

    def _computed(self, *inputs: Tensor, **how: Any) -> Tensor:
        """Compute; under graphs as a graph of its own, which looks at what it baked in whenever it is asked."""
        network = graphs_of(self.inner)
        if network is None:
            return self.compute(*inputs, **how)
        graphs = self.graphs  # another thread may release them
        if graphs is None:
            graphs = self.graphs = GraphedCall(nn.ModuleList(self.carriers()), self.compute, network.max_graphs)
        made: Tensor = graphs(*inputs, **how)
        return made

    def release(self) -> None:
        """Give the memory of the graphs back."""
        if self.graphs is not None:
            self.graphs.clear()
        self.graphs = None

    def tell(self) -> str:
        """Say what happened so far."""
        told = f"{type(self.root).__name__}: {self.calls} calls, computed ahead {self.made} times"
        if self.graphs is not None:
            told = f"{told} ({self.graphs.told()})"
        return f"{told}; not ahead: {self.reason}" if self.reason else told


def graphs_of(call: Any) -> GraphedCall | None:
    """Return the graphs among a network's call and those it stands over."""
    return next((each for each in calls_from(call) if isinstance(each, GraphedCall)), None)


@dataclass
class ComputesAhead(ScopedCallOver):
    """The change that puts such a call over a network's; also the call scope in which it acts."""

    kind: Callable[[nn.Module, Callable[..., Any], Forwards], AheadCall] | None = None
    forwards: Forwards | None = None

    def make(self, inner: Callable[..., Any]) -> AheadCall:
        """Return the call over the network's own."""
        assert self.kind is not None
        self.forwards = self.forwards or Forwards()
        return self.kind(self.module, inner, self.forwards)

    def revert(self) -> str | None:
        """Give layers and network their own forward and call back."""
        if self.call is not None:
            self.call.release()
        left = self.forwards.lift() if self.forwards else None
        return super().revert() or left
