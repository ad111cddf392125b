"""The ledger of one pipeline: which levers are on, one stack for each slot, and how to take any of them off.

Every slot (attention, layout, precision ...) is a stack over the pipeline as it was found. Only the top of a stack is
applied, always directly over the original; switching another lever on first takes the old top off. So `disable_x`
removes
x wherever it stands: a buried lever is just forgotten, and when the top goes, the lever below it is applied again.

Some levers wrap what others change: offload hooks hold the weights, a trace bakes them in. Such slots are taken off
while a slot below them changes and put back afterwards, so the result never depends on the order of the calls.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import ActionFailedError, TurboError, explain_failure
from ..planning.options import Options
from .components import modules_of
from .undo import LEDGER_ATTRIBUTE, Journal

logger = logging.getLogger("diffusers_turbo")

Apply = Callable[[Any, Any], Journal]

_OVER_A_CALL = ("graphs", "denoiser_slicing", "time", "prompt", "guidance")

WRAPPED_BY: dict[str, tuple[str, ...]] = {
    "precision": ("offload", "trace"),
    "layout": ("offload", "trace"),
    "projections": ("offload", "trace"),
    "attention": ("trace",),
    "kernels": ("offload", "compile_unet", "compile_transformer", "compile_vae", "trace", *_OVER_A_CALL),
    "offload": ("trace",),
    "pointwise": ("offload", "trace"),
    "compile_unet": _OVER_A_CALL,
    "exported": _OVER_A_CALL,
    "compile_transformer": _OVER_A_CALL,
    "compile_vae": _OVER_A_CALL,
    "graphs": ("denoiser_slicing", "time", "prompt", "guidance"),
    "denoiser_slicing": ("time", "prompt", "guidance"),
    "time": ("offload", "trace", "prompt", "guidance"),
    "prompt": ("offload", "trace", "guidance"),
    "guidance": ("offload", "trace"),
}
"""Slots that are taken off while the slot on the left changes, outermost last."""

HOOKED_SLOTS = ("offload", "trace")
"""Slots whose levers hang closures and compiled objects on modules, innermost first."""


@dataclass
class Lever:
    """One switched-on action: its options, how to apply it, and its journal while it is in force."""

    options: Options
    journal: Journal | None = None

    @property
    def action(self) -> str:
        """Name of the pipeline method that switched this on."""
        return self.options.action


@dataclass
class Ledger:
    """All levers of one pipeline, by slot, the one in force last."""

    slots: dict[str, list[Lever]] = field(default_factory=dict)
    left_alone: list[str] = field(default_factory=list)
    plan: Any = None
    verification: Any = None
    came_from: dict[str, torch.device] = field(default_factory=dict)
    """Component -> the device it was on, where a plan brought the pipeline to another one."""

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to undo, and nothing to say."""
        return not (self.slots or self.plan or self.left_alone or self.came_from)

    def top(self, slot: str) -> Lever | None:
        """Return the lever in force in `slot`."""
        stack = self.slots.get(slot)
        return stack[-1] if stack else None

    def find(self, action: str) -> Lever | None:
        """Return the lever that `action` switched on, in force or buried."""
        return next((lever for lever in self.levers() if lever.action == action), None)

    def levers(self) -> Iterator[Lever]:
        """Iterate over every lever, slot by slot, the buried ones first."""
        for stack in self.slots.values():
            yield from stack

    def in_force(self) -> Iterator[Lever]:
        """Iterate over the levers that are applied now."""
        return (stack[-1] for stack in self.slots.values() if stack)

    def enable(self, pipe: Any, options: Options, *, below: bool = False) -> Lever:
        """Put the lever of `options` on top of its slot (or at the bottom) and apply it if it is the top.

        The same action with the same options is left as it is; with other options it replaces its earlier self.

        Raises:
            TurboError: it cannot be applied; the pipeline is then as it was before the call.
        """
        slot = stack_name(options)
        stack = self.slots.get(slot, [])
        found = next((lever for lever in stack if lever.options == options), None)
        if found is not None and (below or found is stack[-1]):
            return found
        lever, others = Lever(options), [other for other in stack if other.action != options.action]
        self.rearrange(pipe, slot, [lever, *others] if below else [*others, lever])
        return lever

    def disable(self, pipe: Any, action: str) -> bool:
        """Remove what `action` switched on, wherever it stands; return False when it was not on."""
        holding = [slot for slot, stack in self.slots.items() if any(lever.action == action for lever in stack)]
        for slot in sorted(holding, key=_depth, reverse=True):
            self.rearrange(pipe, slot, [other for other in self.slots[slot] if other.action != action])
        if not holding:
            logger.info("%s was not on: nothing to switch off", action)
        return bool(holding)

    def undo(self, pipe: Any) -> list[str]:
        """Switch everything off, outermost slot first, and return what was left alone."""
        self.left_alone.clear()
        for slot in sorted(self.slots, key=_depth, reverse=True):
            self.rearrange(pipe, slot, [])
        self.bring_back(pipe)
        self.plan = self.verification = None
        return list(self.left_alone)

    def bring(self, pipe: Any, device: torch.device) -> None:
        """Move all components to `device` and remember where they were."""
        found = {name: next(module.parameters(), None) for name, module in modules_of(pipe).items()}
        self.came_from = {name: tensor.device for name, tensor in found.items() if tensor is not None} | self.came_from
        pipe.to(device)

    def bring_back(self, pipe: Any) -> None:
        """Move the components back that `bring` had moved."""
        for name, module in modules_of(pipe).items():
            if name in self.came_from:
                module.to(self.came_from[name])
        self.came_from = {}

    def rearrange(self, pipe: Any, slot: str, wanted: list[Lever]) -> None:
        """Make `wanted` the stack of `slot`; on failure what was in force is in force again and the error goes on."""
        before = self.slots.get(slot, [])
        old, new = (before[-1] if before else None), (wanted[-1] if wanted else None)
        if old is not new:
            around = [lever for name in WRAPPED_BY.get(slot, ()) if (lever := self.top(name)) is not None]
            wrappers = [lever for lever in around if _wraps(lever, slot)]
            try:
                with self._bared():
                    self._take_off(old, *wrappers)
                    self._put_on(pipe, new, *wrappers)
            except Exception as error:
                with self._bared():
                    self._take_off(new, *wrappers)
                    self._put_on(pipe, old, *wrappers)
                if isinstance(error, TurboError) or new is None:
                    raise
                needed = "the action to run to its end (everything it had changed is undone)"
                found = f"{type(error).__name__}: {error}"
                raise ActionFailedError(
                    explain_failure(f"{new.action}()", found, needed, "see the error above this one")
                ) from error
            finally:
                self._look_again()
        if wanted:
            self.slots[slot] = wanted
        else:
            self.slots.pop(slot, None)

    def _look_again(self) -> None:
        """Have what looks at modules once a call do so again: a callback may throw a switch between two steps."""
        for lever in self.in_force():
            for change in lever.journal.changes if lever.journal else ():
                if (look_again := getattr(getattr(change, "call", None), "look_again", None)) is not None:
                    look_again()

    def _put_on(self, pipe: Any, *levers: Lever | None) -> None:
        """Apply these levers in order, leaving out those that are on."""
        from .apply import apply_options

        for lever in levers:
            if lever is not None and lever.journal is None:
                lever.journal = apply_options(pipe, lever.options)

    def _take_off(self, *levers: Lever | None) -> None:
        """Revert these levers, last first, leaving out those that are off."""
        for lever in reversed(levers):
            if lever is None or lever.journal is None:
                continue
            journal, lever.journal = lever.journal, None
            for sentence in journal.revert():
                self.left_alone.append(sentence)
                logger.warning("%s: left alone: %s", lever.action, sentence)

    @contextmanager
    def _bared(self) -> Iterator[None]:
        """Take what stands over the components during calls only (`memory_fallback`) away for the block.

        A callback may throw a switch in the middle of a call, and its changes go underneath.
        """
        scopes = [scope for lever in self.in_force() if lever.journal for scope in lever.journal.scopes]
        with ExitStack() as lifted:
            for scope in scopes:
                if hasattr(scope, "lifted"):
                    lifted.enter_context(scope.lifted())
            yield

    @contextmanager
    def around_call(self, pipe: Any) -> Iterator[None]:
        """Hold every call scope of the levers in force while the block, one call of the pipeline, runs."""
        with ExitStack() as scopes:
            for lever in self.in_force():
                for scope in lever.journal.scopes if lever.journal else ():
                    scopes.enter_context(scope.around_call(pipe))
            yield

    @contextmanager
    def unhooked(self, pipe: Any) -> Iterator[None]:
        """Take offload hooks and traces off for the block, the outermost first, and put them back."""
        hooked = [lever for slot in HOOKED_SLOTS if (lever := self.top(slot)) is not None]
        self._take_off(*hooked)
        try:
            yield
        finally:
            self._put_on(pipe, *hooked)

    def after_copy(self, pipe: Any) -> None:
        """Make on the copy what copied modules do not carry along: offload hooks, traces, compiled calls."""
        self._put_on(pipe, *(lever for slot in HOOKED_SLOTS if (lever := self.top(slot)) is not None))
        # what wraps comes after what it wraps
        for lever in sorted(self.in_force(), key=lambda lever: _depth(stack_name(lever.options))):
            for change in lever.journal.changes if lever.journal else ():
                if hasattr(change, "after_copy"):
                    change.after_copy()


def _wraps(lever: Lever, slot: str) -> bool:
    """Whether a lever of a wrapping slot lies over what this one changes; whole components have no hooks on layers."""
    return not (slot in _OVER_A_CALL and getattr(lever.options, "keeps_all", False))


def _depth(slot: str) -> int:
    """How many other slots this one can wrap: the higher, the earlier it must go."""
    return sum(slot in wrappers for wrappers in WRAPPED_BY.values())


def stack_name(options: Options) -> str:
    """Return the stack an action belongs to: its slot, and for compilation one stack for each component."""
    return options.action if options.slot == "compile" else options.slot


def ledger_of(pipe: Any) -> Ledger | None:
    """Return the pipeline's ledger, or None while nothing is switched on."""
    ledger = vars(pipe).get(LEDGER_ATTRIBUTE)
    return ledger if isinstance(ledger, Ledger) else None


def open_ledger(pipe: Any) -> Ledger:
    """Return the pipeline's ledger, attaching an empty one when there is none."""
    ledger = ledger_of(pipe)
    if ledger is None:
        ledger = Ledger()
        object.__setattr__(pipe, LEDGER_ATTRIBUTE, ledger)
    return ledger


def close_ledger(pipe: Any, *, forget: bool = False) -> None:
    """Remove the ledger from the pipeline once it holds nothing any more; with `forget`, whatever it holds."""
    ledger = ledger_of(pipe)
    if ledger is not None and (forget or ledger.is_empty):
        object.__delattr__(pipe, LEDGER_ATTRIBUTE)
