"""When a plan does not keep its promise: take its steps off one by one, name the guilty ones, keep the others."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..actions.ledger import open_ledger
from ..planning.plan import Plan, Rejected, Step
from .check import Verification, Yardstick


@dataclass(frozen=True, kw_only=True)
class Guilty:
    """A step without which the promise is kept, and what was measured with it."""

    step: Step
    verification: Verification

    @property
    def reason(self) -> str:
        """Why it was taken off, in one sentence."""
        found = self.verification
        why = "; ".join(found.verdict.reasons)
        return f"taken off after verification: {found.verdict.level} where {found.promise} was promised ({why})"


@dataclass(frozen=True, kw_only=True)
class Settlement:
    """The plan as it stands after verification, its last measurement, and the steps that had to go."""

    plan: Plan
    verification: Verification
    guilty: tuple[Guilty, ...]


def settle(pipe: Any, plan: Plan, yardstick: Yardstick) -> Settlement:
    """Check an applied plan; while it breaks its promise, take steps off from the last, and put the innocent back.

    A step is guilty when the promise is kept without it and all later ones, and broken with it. When the promise is
    broken without any step as well, the fault was there before the plan: every step stays off.
    """
    standing, guilty = list(plan.steps), []
    found = yardstick.measure(pipe)
    while not found.kept and standing:
        removed: list[Step] = []
        before = found
        while not found.kept and standing:
            removed.append(standing.pop())
            before = found
            open_ledger(pipe).disable(pipe, removed[-1].action)
            found = yardstick.measure(pipe)
        if not found.kept:
            break
        guilty.append(Guilty(step=removed.pop(), verification=before))
        if removed:
            for step in reversed(removed):
                getattr(pipe, step.action)(**step.options)
                standing.append(step)
            found = yardstick.measure(pipe)
    return Settlement(plan=_amended(plan, standing, guilty, found), verification=found, guilty=tuple(guilty))


def _amended(plan: Plan, standing: list[Step], guilty: list[Guilty], found: Verification) -> Plan:
    """The plan without the steps that went, each among the rejected with its reason."""
    reasons = {id(item.step): item.reason for item in guilty}
    gone = [step for step in plan.steps if step not in standing]
    before = "taken off after verification: the pipeline breaks its promise without any step of this plan as well"
    rejected = tuple(
        Rejected(action=step.action, options=step.options, reason=reasons.get(id(step), before), exact=step.exact)
        for step in gone
    )
    pairs = f"{found.pairs} prompt-and-seed pairs"
    note = f"verified on {pairs}: {found.verdict.level}, {found.ours.psnr_db:.1f} dB from {found.reference}"
    return replace(plan, steps=tuple(standing), rejected=(*plan.rejected, *rejected), notes=(*plan.notes, note))
