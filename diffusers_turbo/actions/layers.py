"""Layers of components: of the denoiser the order in which they work and which stay, of others which come alone.

Names do not tell the order. It is learnt from the visits of one step; where all layers have room it does not matter.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..planning.options import PartialOffload
from ..planning.residents import SMALL_BYTES, aligned, choose_streamed, join_neighbours
from .streaming import Group, Unit, extent, units_of, weights_of


@dataclass(eq=False)
class LayerOrder:
    """The layers of the components that are called at every step.

    Attributes:
        looped: these components.
        options: how much of them may stay.
        units: layers in the order in which they were found.
        fixed: weights of modules that have layers below them: they stay.
        visits: layers in the order in which they have worked so far, each as often as it has.
        learnt: the components that take part in the order.
        groups: groups in the order in which they work; None before that is known.
        staying: those of them that stay.
        streamed: the others.
        group_of: the groups of layers that are streamed.
    """

    looped: dict[str, nn.Module]
    options: PartialOffload
    units: list[Unit] = field(init=False)
    fixed: tuple[Tensor, ...] = field(init=False)
    visits: list[Unit] = field(default_factory=list)
    learnt: list[str] = field(default_factory=list)
    groups: list[Group] | None = None
    staying: list[Group] = field(default_factory=list)
    streamed: list[Group] = field(default_factory=list)
    group_of: dict[Unit, Group] = field(default_factory=dict)
    _known: tuple[Any, ...] = field(init=False)
    _sequence: list[Group] = field(default_factory=list)
    _first_of: dict[str, Group] = field(default_factory=dict)
    _position: int = 0

    def __post_init__(self) -> None:
        self.units, self.fixed = units_of(self.looped)
        self._known = self._signature()

    @property
    def weights(self) -> list[Tensor]:
        """All weights of the components, as they are now."""
        return [tensor for root in self.looped.values() for tensor in weights_of(root)]

    @property
    def resident(self) -> list[Tensor]:
        """The weights that stay, as far as that is known."""
        return [*self.fixed, *(tensor for group in self.staying for tensor in group.tensors)]

    @property
    def resident_bytes(self) -> int:
        """Bytes of the weights that stay."""
        return sum(group.size for group in self.staying) + self._fixed_bytes()

    @property
    def outdated(self) -> bool:
        """Whether weights have come, gone or changed their shape since, such as a LoRA's."""
        return self._known != self._signature()

    def keep_all(self) -> bool:
        """Have all layers stay, in whatever order they work; return whether there is room for them."""
        if sum(unit.size for unit in self.units) > self._room():
            return False
        self.groups = self.staying = [Group(tuple(self.units))]
        self.learnt += self.looped
        return True

    def forget(self) -> None:
        """Forget a step that was interrupted."""
        self.visits.clear()
        self.learnt.clear()

    def learn(self) -> None:
        """Join the layers that were visited into groups, and choose which of them stay."""
        visited = list(dict.fromkeys(self.visits))
        self.groups = [
            Group(tuple(visited[index] for index in indices))
            for indices in join_neighbours([unit.size for unit in visited])
        ]
        chosen = choose_streamed([group.size for group in self.groups], self._room())
        self.staying = [group for index, group in enumerate(self.groups) if index not in chosen]
        self.streamed = [group for index, group in enumerate(self.groups) if index in chosen]
        self.group_of = {unit: group for group in self.streamed for unit in group.units}
        passed = [group for unit in self.visits if (group := self.group_of.get(unit)) is not None]
        self._sequence = [group for index, group in enumerate(passed) if index == 0 or group is not passed[index - 1]]
        for name, root in self.looped.items():
            inside = set(root.modules())
            found = [unit for unit in self.visits if unit in self.group_of and unit.module in inside]
            if found:
                self._first_of[name] = self.group_of[found[0]]
        self.visits.clear()

    def begin(self, component: str) -> Group | None:
        """Begin a component's forward; return the first group that is streamed in it, if there is one."""
        first = self._first_of.get(component)
        if first is not None:
            self._position = self._sequence.index(first) - 1
        return first

    def advance(self, group: Group) -> Group:
        """Go on to a streamed group that works now; return the one after it, which after the last is the first."""
        count = len(self._sequence)
        places = (place % count for place in range(self._position + 1, self._position + 1 + count))
        self._position = next(place for place in places if self._sequence[place] is group)
        return self._sequence[(self._position + 1) % count]

    @property
    def at_end(self) -> bool:
        """Whether the group that works is the last one of a step that is streamed."""
        return self._position + 1 == len(self._sequence)

    def _signature(self) -> tuple[Any, ...]:
        return tuple((id(tensor), tensor.dtype, tensor.shape, tensor.stride()) for tensor in self.weights)

    def _room(self) -> int:
        """Bytes of layers that may stay."""
        fixed = self._fixed_bytes()
        return max(0, self.options.stays(fixed + sum(unit.size for unit in self.units)) - fixed)

    def _fixed_bytes(self) -> int:
        return sum(aligned(extent(tensor)) for tensor in self.fixed)


@dataclass(frozen=True)
class Passing:
    """A component that comes layer by layer: its weights as they were seen, those that stay meanwhile, its layers."""

    weights: list[Tensor]
    fixed: tuple[Tensor, ...]
    units: list[Unit]

    @classmethod
    def of(cls, component: str, module: nn.Module) -> Passing:
        """Look at a component; its small layers stay."""
        found, fixed = units_of({component: module})
        small = (tensor for unit in found if unit.size <= SMALL_BYTES for tensor in unit.tensors)
        return cls(weights_of(module), (*fixed, *small), [unit for unit in found if unit.size > SMALL_BYTES])

    def is_of(self, weights: list[Tensor]) -> bool:
        """Whether a component has these weights still, and no others."""
        same = len(weights) == len(self.weights)
        return same and all(now is then for now, then in zip(weights, self.weights, strict=True))
