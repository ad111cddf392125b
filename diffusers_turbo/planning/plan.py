"""The plan: what will be switched on, what was considered and left off, and why. Data and text; it decides nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..errors import InvalidOptionError, explain_failure
from .estimate import MemoryEstimate
from .options import ACTIONS, Options, make_options
from .timing import STEPS
from .units import gib

FORMAT_VERSION = 1

_AS_MUCH = 1.01
"""Up to this ratio two peaks count as the same."""

_ESTIMATES = ("before", "after")


@dataclass(frozen=True, kw_only=True)
class Step:
    """One switch that the plan turns on: the method's name, its arguments, and one sentence why."""

    action: str
    options: Mapping[str, Any]
    reason: str
    exact: bool

    def typed_options(self) -> Options:
        """Return the arguments as the action's own options class, checked.

        Raises:
            InvalidOptionError: the step was edited by hand into something the action does not accept.
        """
        return make_options(self.action, **self.options)


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """One switch that was considered and left off, with the arguments it would have had and one sentence why."""

    action: str
    options: Mapping[str, Any]
    reason: str
    exact: bool


@dataclass(frozen=True, kw_only=True)
class Alternative:
    """One combination of memory switches that was weighed, with all the plan's other switches that go with it.

    Attributes:
        switches: the memory switches as calls; none of them is a way, too.
        lean: whether copies of weights and graphs, which are for speed, were done without.
        exact: whether the memory switches leave the picture as it is, up to rounding.
        peak_bytes, needed_bytes: the estimated peak, and with its margin.
        added_seconds: what moving weights, and doing without graphs, adds to a call of the steps asked for, at most, as
            measured on an H100.
        fits: whether it fits, None where it is not known what is usable.
    """

    switches: tuple[str, ...]
    lean: bool
    exact: bool
    peak_bytes: int
    needed_bytes: int
    added_seconds: float
    fits: bool | None

    def beats(self, other: Alternative) -> bool:
        """Whether it is as exact as another way and faster in about its memory, or as fast in less."""
        if self.exact < other.exact:
            return False
        if self.added_seconds < other.added_seconds:
            return self.needed_bytes <= _AS_MUCH * other.needed_bytes
        return self.added_seconds == other.added_seconds and self.needed_bytes < other.needed_bytes

    @property
    def name(self) -> str:
        """The switches for a reader."""
        if not self.switches:
            return "without copies for speed" if self.lean else "no memory switch"
        return " + ".join(self.switches) + ("" if self.lean else ", with graphs")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to switch on, in order, for one pipeline on one device.

    `request` and `facts` are summaries for the reader; `before` and `after` are the estimated peaks of the pipeline
    as it stands and with all steps applied; `alternatives` are the ways to save memory that were weighed; `notes` are
    things to know that are no switch.
    """

    steps: tuple[Step, ...]
    rejected: tuple[Rejected, ...]
    request: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    before: MemoryEstimate | None = None
    after: MemoryEstimate | None = None
    budget_bytes: int | None = None
    alternatives: tuple[Alternative, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def exact(self) -> bool:
        """True when no step changes the picture beyond rounding."""
        return all(step.exact for step in self.steps)

    @property
    def fits(self) -> bool | None:
        """Whether the estimated peak, with its margin, is within the budget; None where one of the two is unknown."""
        if self.after is None or self.budget_bytes is None:
            return None
        return self.after.needed_bytes <= self.budget_bytes

    def explain(self) -> str:
        """Return the plan as text: steps, rejected options, memory, notes."""
        lines = [_headline(self.facts, self.request)]
        lines.append("Steps:" if self.steps else "Steps: none, the pipeline stays as it is.")
        for number, step in enumerate(self.steps, 1):
            lines.append(f"  {number}. {call_text(step.action, step.options)}{'' if step.exact else '  LOSSY'}")
            lines.append(f"     {step.reason}")
        if self.rejected:
            lines.append("Not taken:")
            for item in self.rejected:
                lines.append(
                    f"  - {call_text(item.action, item.options)}{'' if item.exact else '  LOSSY'}: {item.reason}"
                )
        lines.extend(self._memory_lines())
        if self.notes:
            lines.append("Notes:")
            lines.extend(f"  - {note}" for note in self.notes)
        return "\n".join(lines)

    def _memory_lines(self) -> list[str]:
        if self.before is None or self.after is None:
            return []
        lines = ["Estimated peak (allocated), before -> after:"]
        for old, new in zip(self.before.stages, self.after.stages, strict=True):
            lines.append(f"  {old.stage}: {gib(old.peak_bytes)} -> {gib(new.peak_bytes)}")
        if self.budget_bytes is not None:
            verdict = "fits" if self.fits else "DOES NOT FIT"
            need = gib(self.after.needed_bytes)
            lines.append(f"  with its margin {need} of {gib(self.budget_bytes)} usable: {verdict}")
        return [*lines, *self._alternative_lines()]

    def _alternative_lines(self) -> list[str]:
        """Show the ways to save memory where one of them is needed, but for those that another way beats."""
        if not self.alternatives or self.alternatives[0].fits is not False:
            return []
        fitting = [item.added_seconds for item in self.alternatives if item.fits and item.exact]
        call = f"a call of {self.request.get('steps', STEPS)} steps"
        lines = [f"Ways to fit (peak with margin, what moving weights or no graphs adds to {call} at most):"]
        for item in self.alternatives:
            beaten = any(other.beats(item) for other in self.alternatives)
            if beaten or (not item.exact and item.added_seconds >= min(fitting, default=float("inf"))):
                continue
            fit = "fits" if item.fits else "does not fit"
            lossy = "" if item.exact else ", LOSSY"
            lines.append(f"  - {item.name}: {gib(item.needed_bytes)}, +{item.added_seconds:.1f} s, {fit}{lossy}")
        return lines

    def __str__(self) -> str:
        return self.explain()

    def as_dict(self) -> dict[str, Any]:
        """Return plain dicts, lists, numbers and text."""
        return {"format_version": FORMAT_VERSION, **asdict(self)}

    def to_json(self, *, indent: int | None = 2) -> str:
        """Return the plan as JSON that `from_json` reads back into an equal plan."""
        return json.dumps(self.as_dict(), indent=indent)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan written by `to_json`.

        Raises:
            InvalidOptionError: the text is no plan of this format, or names an action there is not.
        """
        try:
            data = json.loads(text)
            version = data.pop("format_version")
            data.pop("predicted", None)  # what the command line prints beside a plan
            steps = tuple(Step(**item) for item in data.pop("steps"))
            rejected = tuple(Rejected(**item) for item in data.pop("rejected"))
            notes = tuple(data.pop("notes"))
            before, after = (
                MemoryEstimate.from_dict(found) if (found := data.pop(key)) else None for key in _ESTIMATES
            )
            ways = tuple(
                Alternative(**{**item, "switches": tuple(item["switches"])}) for item in data.pop("alternatives", ())
            )
            plan = cls(
                steps=steps, rejected=rejected, alternatives=ways, notes=notes, before=before, after=after, **data
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _no_plan(f"{type(error).__name__}: {error}") from error
        if version != FORMAT_VERSION:
            raise _no_plan(f"format_version {version!r}")
        named = {step.action for step in plan.steps} | {item.action for item in plan.rejected}
        if unknown := sorted(named - set(ACTIONS)):
            raise _no_plan(f"the unknown actions {', '.join(unknown)}")
        return plan


def _no_plan(found: str) -> InvalidOptionError:
    return InvalidOptionError(
        explain_failure(
            "Plan.from_json()",
            found,
            f"the JSON text of Plan.to_json(), format_version {FORMAT_VERSION}",
            "make the plan again with plan() and save it with to_json()",
        )
    )


def call_text(action: str, options: Mapping[str, Any]) -> str:
    """Print a call with the arguments that differ from the method's defaults."""
    defaults = ACTIONS[action]().as_dict() if action in ACTIONS else {}
    given = [f"{name}={value!r}" for name, value in options.items() if value != defaults.get(name)]
    return f"{action}({', '.join(given)})"


def _headline(facts: Mapping[str, Any], request: Mapping[str, Any]) -> str:
    pipeline, device = facts.get("pipeline", "a pipeline"), facts.get("device", "a device")
    size = f"{request.get('width', '?')}x{request.get('height', '?')}"
    return f"Plan for {pipeline} on {device}, {size}, batch {request.get('batch_size', 1)}"
