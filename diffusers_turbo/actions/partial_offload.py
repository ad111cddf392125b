"""As much of the denoiser on the device as fits, the rest streamed through it; every other component comes and goes.

The first forward runs layer by layer and learns the order in which they work. From it follow the groups, which of them
stay (`planning.residents`), and where the others wait: in page-locked memory as far as its budget goes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from ..errors import NotSupportedError, explain_failure
from ..facts.host import host_memory
from ..facts.pipeline import read_pipeline
from ..graphs.capture import is_recording
from ..modules import modules_in
from ..planning.memory import LOOPED_ROLES
from ..planning.options import PartialOffload
from ..planning.residents import SMALL_BYTES, aligned, choose_streamed, join_neighbours, window_sizes
from ..planning.units import gib
from .calls import look_again, release_recorded
from .components import denoiser_of, modules_of
from .hooks import ComponentHook, Hook, UnitHook
from .offload import Placement, accelerator, refuse_foreign_offload
from .page_locked import Slab, can_pin, pin
from .streaming import (
    HOST,
    Group,
    Loan,
    Unit,
    Window,
    bring,
    extent,
    return_cached,
    units_of,
    weights_of,
)
from .undo import ABSENT, Journal, journaling, owned, put


@dataclass(frozen=True)
class Passing:
    """A component that comes layer by layer: its weights as they were seen, those that stay meanwhile, its layers."""

    weights: list[Tensor]
    fixed: tuple[Tensor, ...]
    modules: set[nn.Module]

    def is_of(self, weights: list[Tensor]) -> bool:
        """Whether a component has these weights still, and no others."""
        same = len(weights) == len(self.weights)
        return same and all(now is then for now, then in zip(weights, self.weights, strict=True))


@dataclass(eq=False)
class PartialResidency:
    """Which weights of a pipeline are on the device: a change that can be reverted, and the scope of its calls.

    Attributes:
        looped: the components that are called at every step, in that order, the denoiser last.
        others: those that come to work and leave, one at a time.
        units: layers by module, in the order in which they were found.
        fixed: weights of modules that have layers below them: they stay.
        groups: what was learnt: groups in the order in which they work; None before the first forward has ended.
        streamed: those of them that do not stay.

    Of the other components those that the options name come layer by layer.
    """

    device: torch.device
    options: PartialOffload
    looped: dict[str, nn.Module]
    others: dict[str, nn.Module]
    units: list[Unit] = field(default_factory=list)
    fixed: tuple[Tensor, ...] = ()
    groups: list[Group] | None = None
    streamed: list[Group] = field(default_factory=list)
    trouble: str = ""
    _slabs: WeakSet[Slab] = field(default_factory=WeakSet)
    _passing: dict[str, Passing] = field(default_factory=dict)
    _known: tuple[Any, ...] = ()
    _hooked: list[tuple[nn.Module, Any]] = field(default_factory=list)
    _group_of: dict[Unit, Group] = field(default_factory=dict)
    _sequence: list[Group] = field(default_factory=list)
    _first_of: dict[str, Group] = field(default_factory=dict)
    _position: int = 0
    _visits: list[Unit] = field(default_factory=list)
    _learnt: list[str] = field(default_factory=list)
    _alone: dict[Unit, tuple[Tensor, ...]] = field(default_factory=dict)
    _window: Window | None = None
    _staying: Loan = field(init=False)
    _visiting: Loan = field(init=False)
    _here: bool = False
    _working: str | None = None
    _in_call: bool = False
    _checked: bool = False
    _all_pinned: bool = False
    _over: bool = False

    def __post_init__(self) -> None:
        self._staying, self._visiting = Loan(self.device), Loan(self.device)

    @contextmanager
    def around_call(self, pipe: Any) -> Iterator[None]:
        """Run a call of the pipeline; at its end only what stays of the denoiser is on the device."""
        self._in_call, self._checked = True, False
        try:
            yield
        finally:
            self._in_call = False
            if not self._over:
                self._send_others()
                self._close_window()
                self._send_alone()  # of a forward that was interrupted
                if self.options.denoiser_leaves:
                    self._send_denoiser()

    def revert(self) -> None:
        """Let go of everything; `Placement` takes the hooks off and says where the weights go."""
        self._close_window()
        self._send_alone()
        self._staying.forget()
        self._visiting.forget()
        self._over = True
        self.units.clear()
        self._passing.clear()
        self.groups, self.streamed, self._sequence = None, [], []
        self._group_of.clear()

    def tell(self) -> list[str]:
        """Say what stays and what is streamed, as far as it is known."""
        if self.groups is None:
            return []
        streamed = sum(group.size for group in self.streamed)
        stays = sum(group.size for group in self.groups) - streamed + self._fixed_bytes()
        told = [f"{gib(stays)} stay on {self.device}, {gib(streamed)} are streamed in {len(self.streamed)} groups"]
        if self.streamed and self.options.pin_memory:
            told.append(f"{gib(self.pinned_bytes)} are page-locked" + (f": {self.trouble}" if self.trouble else ""))
        return told

    def start(self) -> None:
        """Send everything to host memory and hang up the hooks."""
        self._over = False
        self._pin_at_once()
        for module in (*self.looped.values(), *self.others.values()):
            bring(weights_of(module), HOST)
        for name, module in {**self.looped, **self.others}.items():
            self._hook(module, ComponentHook(self, self.device, component=name))
        self._begin_to_learn()

    def arrive(self, component: str) -> None:
        """Bring a component that is about to be called, and send away what it does not work with."""
        if component not in self.looped:
            if self._working != component:
                self._send_others()
                self._close_window()
                if self.options.denoiser_leaves:
                    self._send_denoiser()
                self._visiting.bring(self._visitors(component), faithful=self._in_call)
                self._working = component
            return
        self._send_others()
        if self.groups is not None and component not in self._learnt:
            self._begin_to_learn()  # a ControlNet that had no part in the first step
        if not (self._in_call and self._checked):
            self._look_for_changes()
        if not self._here:
            if self.streamed:
                return_cached(self.device)  # weights in the middle of it leave gaps that no graph can use
            self._staying.bring(self._resident(), faithful=self._in_call and self.options.denoiser_leaves)
            self._here = True
        if self.groups is None:
            if component in self._learnt:
                self._forget()  # a forward that was interrupted
            self._learnt.append(component)
            return
        if self.streamed and self._window is None:
            groups = [group.size for group in self.streamed]
            self._window = Window(self.device, window_sizes(groups, range(len(groups)), self.options.window))

    def settle(self) -> None:
        """Have the window hold nothing: what was recorded of a forward fills it by itself."""
        if self._window is not None:
            self._window.settle()

    def interrupted(self) -> None:
        """Have the window's stream come back from a recording, if it takes part in one."""
        if self._window is not None and self._window.recording:
            self._window.settle()

    def begin(self, component: str) -> None:
        """Fetch the first group of a component's forward."""
        if self._window is None:
            return
        self._window.begin()
        if (first := self._first_of.get(component)) is not None:
            self._position = self._sequence.index(first) - 1
            self._window.fetch(first)

    def finish(self, component: str) -> None:
        """Look back at a component's forward: the window rests, and a first one has told the order of the layers."""
        if self._window is not None:
            self._window.leave()
            if is_recording(self.device):
                self._window.settle()
        if self.groups is None and component == next(reversed(self.looped), None):
            self._learn()

    def enter(self, unit: Unit) -> None:
        """Have a layer's weights on the device, and fetch the group after its own."""
        group = self._group_of.get(unit)
        if group is None or self._window is None:
            if self.groups is None and self._working is None:
                self._visits.append(unit)
            self._alone[unit] = tuple(tensor.data for tensor in unit.tensors)
            bring(unit.tensors, self.device)
            return
        if self._window.working is group:
            return
        self._window.enter(group)
        places = range(self._position + 1, self._position + 1 + len(self._sequence))
        count = len(self._sequence)
        self._position = next(place % count for place in places if self._sequence[place % count] is group)
        if self._position + 1 < count or not is_recording(self.device):  # a replay begins with the first group itself
            self._window.fetch(self._sequence[(self._position + 1) % count])

    def leave(self, unit: Unit) -> None:
        """Send a layer's weights away that belong to no group (yet)."""
        homes = self._alone.pop(unit, ())
        for tensor, home in zip(unit.tensors, homes, strict=False):
            tensor.data = home

    # what is known of the layers

    @property
    def will_record(self) -> bool:
        """Whether what is streamed is meant to come from page-locked memory, where that is a matter."""
        return self.options.pin_memory or self.options.keeps_all or not can_pin(self.device)

    @property
    def lets_record(self) -> bool:
        """Whether a denoiser's call may be recorded: it comes whole, or is streamed from page-locked memory alone."""
        if self.groups is None:
            return False
        return not self.streamed or not can_pin(self.device) or (self.options.pin_memory and self._all_pinned)

    def _visitors(self, component: str) -> Iterable[Tensor]:
        """Return the weights of a component that are there as long as it works; hook its layers if they come alone."""
        module = self.others[component]
        weights = weights_of(module)
        if component not in self.options.alone:
            return weights
        passing = self._passing.get(component)
        if passing is None or not passing.is_of(weights):  # others have come or gone, such as a LoRA's
            before = set() if passing is None else passing.modules
            self._unhook(keep=tuple(part for part, _ in self._hooked if part not in before))
            found, fixed = units_of({component: module})
            units = [unit for unit in found if unit.size > SMALL_BYTES]
            small = (tensor for unit in found if unit.size <= SMALL_BYTES for tensor in unit.tensors)
            self._passing[component] = passing = Passing(weights, (*fixed, *small), {unit.module for unit in units})
            for unit in units:
                self._hook(unit.module, UnitHook(self, self.device, unit=unit))
        return passing.fixed

    def _begin_to_learn(self) -> None:
        layers = {module for passing in self._passing.values() for module in passing.modules}
        self._unhook(keep=(*self.looped.values(), *self.others.values(), *layers))
        self._close_window()
        self._send_denoiser()
        self.groups, self.streamed, self._sequence = None, [], []
        self._group_of.clear()
        self._forget()
        self.units, self.fixed = units_of(self.looped)
        self._known = self._signature()
        if sum(unit.size for unit in self.units) <= self._room():  # in whatever order
            self.groups = [Group(tuple(self.units))]
            self._learnt += self.looped
            self._pin()
        else:
            for unit in self.units:
                self._hook(unit.module, UnitHook(self, self.device, unit=unit))
        self._have_looked_again()

    def _have_looked_again(self) -> None:
        """Have graphs look at the looped components, which can be recorded from now on, or no longer."""
        for module in modules_in(*self.looped.values()):
            look_again(module)

    def _forget(self) -> None:
        self._send_alone()
        self._visits.clear()
        self._learnt.clear()

    def _look_for_changes(self) -> None:
        """Learn anew where weights have come, gone or changed their shape, such as a LoRA's."""
        self._checked = True
        if self._known != self._signature():
            self._begin_to_learn()
        here = {id(tensor) for tensor in self._resident()} if self._here else ()
        # what somebody moved meanwhile
        weights = (tensor for root in self.looped.values() for tensor in weights_of(root))
        bring((tensor for tensor in weights if id(tensor) not in here and tensor.device.type != HOST.type), HOST)

    def _signature(self) -> tuple[Any, ...]:
        tensors = (tensor for root in self.looped.values() for tensor in weights_of(root))
        return tuple((id(tensor), tensor.dtype, tensor.shape, tensor.stride()) for tensor in tensors)

    def _learn(self) -> None:
        visited = list(dict.fromkeys(self._visits))
        self.groups = [
            Group(tuple(visited[index] for index in indices))
            for indices in join_neighbours([unit.size for unit in visited])
        ]
        chosen = choose_streamed([group.size for group in self.groups], self._room())
        self.streamed = [self.groups[index] for index in sorted(chosen)]
        self._group_of = {unit: group for group in self.streamed for unit in group.units}
        passed = [group for unit in self._visits if (group := self._group_of.get(unit)) is not None]
        self._sequence = [group for index, group in enumerate(passed) if index == 0 or group is not passed[index - 1]]
        self._first_of = {}
        for name, root in self.looped.items():
            inside = set(root.modules())
            found = [unit for unit in self._visits if unit in self._group_of and unit.module in inside]
            if found:
                self._first_of[name] = self._group_of[found[0]]
        self._visits.clear()
        staying = [unit.module for group in self.groups for unit in group.units if unit not in self._group_of]
        everything = [module for module, _ in self._hooked]
        gone = {id(module) for module in staying}
        self._unhook(keep=tuple(module for module in everything if id(module) not in gone))
        self._pin()
        self._here = False  # what stays comes before the next forward
        self._have_looked_again()

    def _room(self) -> int:
        """Bytes of layers that may stay."""
        fixed = self._fixed_bytes()
        return max(0, self.options.stays(fixed + sum(unit.size for unit in self.units)) - fixed)

    def _fixed_bytes(self) -> int:
        return sum(aligned(extent(tensor)) for tensor in self.fixed)

    def _resident(self) -> list[Tensor]:
        groups = [group for group in self.groups or () if not any(unit in self._group_of for unit in group.units)]
        return [*self.fixed, *(tensor for group in groups for tensor in group.tensors)]

    def _pin_at_once(self) -> None:
        """Move into page-locked memory what comes from the device and will wait there, if all of it has room."""
        waiting = [*self.others.values(), *(self.looped.values() if self.options.denoiser_leaves else ())]
        there = [tensor for part in waiting for tensor in weights_of(part) if tensor.device.type != HOST.type]
        if self._pins and sum(aligned(extent(tensor)) for tensor in there) <= self._pinned_budget():
            self._pin_these(there)

    def _pin(self) -> None:
        """Move into page-locked memory what is streamed, and then what comes and goes, as far as its budget goes."""
        self.trouble, self._all_pinned = "", False
        if self._pins:
            streamed = [tensor for group in self.streamed for tensor in group.tensors]
            visitors = [weights_of(module) for module in self.others.values()]
            visitors += [self._resident()] if self.options.denoiser_leaves else []
            visiting = [tensor for part in visitors for tensor in part if tensor.device.type == HOST.type]
            self._pin_these([tensor for tensor in (*streamed, *visiting) if not tensor.is_pinned()])
            self._all_pinned = all(tensor.is_pinned() or not tensor.numel() for tensor in streamed)

    def _pin_these(self, tensors: Iterable[Tensor]) -> None:
        left = max(0, self._pinned_budget() - self.pinned_bytes)
        slabs, self.trouble = pin(list(dict.fromkeys(tensors)), left, self.device)
        self._slabs.update(slabs)

    @property
    def pinned_bytes(self) -> int:
        """Page-locked memory that weights lie in."""
        return sum(map(len, self._slabs))

    @property
    def _pins(self) -> bool:
        return self.options.pin_memory and can_pin(self.device)

    def _pinned_budget(self) -> int:
        return int(self.options.pinned_bytes) if self.options.pinned_bytes is not None else host_memory()[1] // 2

    # who goes

    def _send_others(self) -> None:
        if self._working is not None:
            self._visiting.end()
            self._working = None

    def _send_denoiser(self) -> None:
        self._here = False
        self._release_recorded()
        self._staying.end()

    def _release_recorded(self) -> None:
        for module in modules_in(*self.looped.values()):
            release_recorded(module)

    def _send_alone(self) -> None:
        for unit in list(self._alone):
            self.leave(unit)

    def _close_window(self) -> None:
        if self._window is not None:
            self._release_recorded()  # which reads from the window
            self._window.close()
            self._window = None

    # hooks

    def _hook(self, module: nn.Module, hook: Hook) -> None:
        from accelerate.hooks import add_hook_to_module

        for name in ("pre_forward", "post_forward"):
            # weights move outside of compiled code
            setattr(hook, name, torch.compiler.disable(getattr(hook, name)))  # type: ignore[no-untyped-call]
        self._hooked.append((module, owned(module, "forward")))
        add_hook_to_module(module, hook)

    def _unhook(self, keep: tuple[nn.Module, ...]) -> None:
        from accelerate.hooks import remove_hook_from_module

        kept = {id(module) for module in keep}
        for module, forward in self._hooked:
            if id(module) not in kept:
                remove_hook_from_module(module)
                # one that was taken back under the hook is nobody's any more
                put(module, "forward", ABSENT if getattr(forward, "lifted", False) else forward)
        self._hooked = [(module, forward) for module, forward in self._hooked if id(module) in kept]


def apply(pipe: Any, options: PartialOffload) -> Journal:
    """Exact: keep of the denoiser what fits on the device, and stream the rest; all else comes to work and leaves."""
    tried = f"{options.action}()"
    refuse_foreign_offload(pipe, tried)
    device = torch.device(options.device) if options.device is not None else accelerator(tried)
    denoiser, _ = denoiser_of(pipe, tried)
    modules = modules_of(pipe)
    roles = {part.name: part.role for part in read_pipeline(pipe).components}
    names = sorted((name for name in modules if roles.get(name) in LOOPED_ROLES), key=lambda name: name == denoiser)
    looped = {name: modules[name] for name in names}
    others = {name: module for name, module in modules.items() if name not in looped}
    if missing := sorted(set(options.alone) - set(others)):
        needed = f"names among {', '.join(others) or 'none: there is no other component'}"
        raise NotSupportedError(
            explain_failure(tried, f"by_layers={', '.join(missing)}", needed, "name components of this pipeline")
        )
    with journaling() as journal:
        journal.add(Placement.of(pipe))
        residency = PartialResidency(device, options, looped, others)
        journal.add(residency)
        journal.scopes.append(residency)
        residency.start()
        share = "all" if options.resident_bytes is None else f"up to {gib(int(options.resident_bytes))}"
        rest = "" if options.keeps_all else "the rest is streamed; "
        journal.note(f"{share} of {', '.join(looped)} stay on {device} between steps")
        journal.note(f"{rest}{', '.join(others) or 'nothing else'} come to work and leave")
        if options.alone:
            journal.note(f"{', '.join(options.alone)} layer by layer")
    return journal
