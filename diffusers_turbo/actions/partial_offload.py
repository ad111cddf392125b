"""As much of the denoiser on the device as fits, the rest streamed through it; every other component comes and goes.

The first forward runs layer by layer, from which follows what stays (`layers`). What does not waits in page-locked
memory, as far as its budget goes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import NotSupportedError, explain_failure
from ..facts.pipeline import read_pipeline
from ..graphs.capture import is_recording, return_cached
from ..modules import modules_in
from ..planning.memory import looped_names
from ..planning.options import PartialOffload
from ..planning.residents import window_sizes
from ..planning.units import gib
from .cached_memory import return_cached_if_tight
from .calls import look_again, release_recorded
from .components import denoiser_of, modules_of
from .hooks import ComponentHook, Hooked, UnitHook
from .layers import LayerOrder, Passing
from .offload import Placement, accelerator, refuse_foreign_offload
from .page_locked import PinnedMemory
from .streaming import HOST, Loan, Unit, Window, bring, weights_of
from .undo import Journal, journaling


@dataclass(eq=False)
class PartialResidency:
    """Which weights of a pipeline are on the device: a change that can be reverted, and the scope of its calls.

    Attributes:
        looped: the components that are called at every step, in that order, the denoiser last.
        others: those that come to work and leave, one at a time.
        layers: what is known of the looped components' layers.
        pinned: where weights wait.

    Of the other components those that the options name come layer by layer.
    """

    device: torch.device
    options: PartialOffload
    looped: dict[str, nn.Module]
    others: dict[str, nn.Module]
    layers: LayerOrder = field(init=False)
    pinned: PinnedMemory = field(init=False)
    _passing: dict[str, Passing] = field(default_factory=dict)
    _hooked: Hooked = field(default_factory=Hooked)
    _alone: dict[Unit, tuple[Tensor, ...]] = field(default_factory=dict)
    _window: Window | None = None
    _staying: Loan = field(init=False)
    _visiting: Loan = field(init=False)
    _here: bool = False
    _working: str | None = None
    _in_call: bool = False
    _checked: bool = False
    _over: bool = False

    def __post_init__(self) -> None:
        self.layers = LayerOrder({}, self.options)
        self.pinned = PinnedMemory(self.device, self.options)
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
        self._passing.clear()
        self.layers = LayerOrder({}, self.options)

    def tell(self) -> list[str]:
        """Say what stays and what is streamed, as far as it is known."""
        if self.layers.groups is None:
            return []
        stays, groups = self.layers.resident_bytes, self.layers.streamed
        streamed = sum(group.size for group in groups)
        told = [f"{gib(stays)} stay on {self.device}, {gib(streamed)} are streamed in {len(groups)} groups"]
        if groups and self.options.pin_memory:
            why = f": {self.pinned.trouble}" if self.pinned.trouble else ""
            told.append(f"{gib(self.pinned.size)} are page-locked{why}")
        return told

    def start(self) -> None:
        """Send everything to host memory and hang up the hooks."""
        self._over = False
        self._pin_at_once()
        for module in (*self.looped.values(), *self.others.values()):
            bring(weights_of(module), HOST)
        for name, module in {**self.looped, **self.others}.items():
            self._hooked.hang(module, ComponentHook(self, self.device, component=name))
        self._begin_to_learn()

    def arrive(self, component: str) -> None:
        """Bring a component that is about to be called, and send away what it does not work with."""
        self._send_alone()  # of a forward that was interrupted
        if component not in self.looped:
            if self._working != component:
                self._send_others()
                self._close_window()
                if self.options.denoiser_leaves:
                    self._send_denoiser()
                self._visiting.bring(self._visitors(component), faithful=self._in_call)
                self._working = component
            return
        others_left = self._working is not None
        self._send_others()
        if self.layers.groups is not None and component not in self.layers.learnt:
            self._begin_to_learn()  # a ControlNet that had no part in the first step
        if not (self._in_call and self._checked):
            self._look_for_changes()
        if not self._here and self.layers.streamed:
            return_cached(self.device)  # weights in the middle of it leave gaps that no graph can use
        elif not self._here or others_left:
            return_cached_if_tight(self.device)  # what comes now is there for the decode, too, and so are its segments
        if not self._here:
            self._staying.bring(self.layers.resident, faithful=self._in_call and self.options.denoiser_leaves)
            self._here = True
        if self.layers.groups is None:
            if component in self.layers.learnt:  # in a step that was interrupted
                self.layers.forget()
            self.layers.learnt.append(component)
            return
        if self.layers.streamed and self._window is None:
            sizes = [group.size for group in self.layers.streamed]
            self._window = Window(self.device, window_sizes(sizes, range(len(sizes)), self.options.window))

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
        if (first := self.layers.begin(component)) is not None:
            self._window.fetch(first)

    def finish(self, component: str) -> None:
        """Look back at a component's forward: the window rests, and a first one has told the order of the layers."""
        if self._window is not None:
            self._window.leave()
            if is_recording(self.device):
                self._window.settle()
        if self.layers.groups is None and component == next(reversed(self.looped), None):
            self._learn()

    def enter(self, unit: Unit) -> None:
        """Have a layer's weights on the device, and fetch the group after its own."""
        group = self.layers.group_of.get(unit)
        if group is None or self._window is None:
            if self.layers.groups is None and self._working is None:
                self.layers.visits.append(unit)
            self._alone[unit] = tuple(tensor.data for tensor in unit.tensors)
            bring(unit.tensors, self.device)
            return
        if self._window.working is group:
            return
        self._window.enter(group)
        following = self.layers.advance(group)
        if not self.layers.at_end or not is_recording(self.device):  # a replay begins with the first group itself
            self._window.fetch(following)

    def leave(self, unit: Unit) -> None:
        """Send a layer's weights away that belong to no group (yet)."""
        homes = self._alone.pop(unit, ())
        for tensor, home in zip(unit.tensors, homes, strict=False):
            tensor.data = home

    @property
    def will_record(self) -> bool:
        """Whether what is streamed is meant to come from page-locked memory, where that is a matter."""
        return self.options.keeps_all or self.pinned.is_wanted

    @property
    def lets_record(self) -> bool:
        """Whether a denoiser's call may be recorded: it comes whole, or is streamed from page-locked memory alone."""
        if self.layers.groups is None:
            return False
        return not self.layers.streamed or self.pinned.holds_streamed

    # what is known of the layers

    def _visitors(self, component: str) -> Iterable[Tensor]:
        """Return the weights of a component that are there as long as it works; hook its layers if they come alone."""
        module = self.others[component]
        weights = weights_of(module)
        if component not in self.options.alone:
            return weights
        passing = self._passing.get(component)
        if passing is None or not passing.is_of(weights):  # others have come or gone, such as a LoRA's
            self._hooked.take_off(passing.units if passing is not None else ())
            self._passing[component] = passing = Passing.of(component, module)
            self._hook(passing.units)
        return passing.fixed

    def _begin_to_learn(self) -> None:
        self._hooked.take_off(self.layers.units)
        self._close_window()
        self._send_denoiser()
        self._send_alone()
        self.layers = LayerOrder(self.looped, self.options)
        if self.layers.keep_all():
            self._pin()
        else:
            self._hook(self.layers.units)
        self._have_looked_again()

    def _hook(self, units: Iterable[Unit]) -> None:
        for unit in units:
            self._hooked.hang(unit.module, UnitHook(self, self.device, unit=unit))

    def _have_looked_again(self) -> None:
        """Have graphs look at the looped components, which can be recorded from now on, or no longer."""
        for module in modules_in(*self.looped.values()):
            look_again(module)

    def _look_for_changes(self) -> None:
        """Learn anew where weights have come, gone or changed their shape, such as a LoRA's."""
        self._checked = True
        if self.layers.outdated:
            self._begin_to_learn()
        here = {id(tensor) for tensor in self.layers.resident} if self._here else ()
        weights = self.layers.weights
        # what somebody moved meanwhile
        bring((tensor for tensor in weights if id(tensor) not in here and tensor.device.type != HOST.type), HOST)

    def _learn(self) -> None:
        """Learn the order of the layers; those that stay need no hooks any more."""
        self.layers.learn()
        self._hooked.take_off(unit for group in self.layers.staying for unit in group.units)
        self._pin()
        self._here = False  # what stays comes before the next forward
        self._have_looked_again()

    def _pin_at_once(self) -> None:
        """Move into page-locked memory what comes from the device and will wait there, if all of it has room."""
        waiting = [*self.others.values(), *(self.looped.values() if self.options.denoiser_leaves else ())]
        there = [tensor for part in waiting for tensor in weights_of(part) if tensor.device.type != HOST.type]
        self.pinned.take_all(there)

    def _pin(self) -> None:
        """Move into page-locked memory what is streamed, and then what comes and goes."""
        streamed = [tensor for group in self.layers.streamed for tensor in group.tensors]
        visitors = [weights_of(module) for module in self.others.values()]
        visitors += [self.layers.resident] if self.options.denoiser_leaves else []
        visiting = [tensor for part in visitors for tensor in part if tensor.device.type == HOST.type]
        self.pinned.take(streamed, visiting)

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


def apply(pipe: Any, options: PartialOffload) -> Journal:
    """Exact: keep of the denoiser what fits on the device, and stream the rest; all else comes to work and leaves."""
    tried = f"{options.action}()"
    refuse_foreign_offload(pipe, tried)
    device = torch.device(options.device) if options.device is not None else accelerator(tried)
    denoiser_of(pipe, tried)  # or a refusal
    modules = modules_of(pipe)
    looped = {name: modules[name] for name in looped_names(read_pipeline(pipe))}
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
