"""What is switched on, in words and as data. Measures nothing and asks nothing but the ledger."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ReportedLever:
    """One lever: the method that switched it on, all its options, those not left at their default, what it says."""

    action: str
    options: dict[str, Any]
    given: dict[str, Any]
    slot: str
    exact: bool
    lossy_reason: str | None
    in_force: bool
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Report:
    """The state of a turbo pipeline; `str()` prints it."""

    pipeline: str
    levers: tuple[ReportedLever, ...]
    left_alone: tuple[str, ...]
    plan: Any = None
    verification: Any = None

    @property
    def exact(self) -> bool:
        """Whether everything in force is exact: the same mathematics up to rounding."""
        return all(lever.exact for lever in self.levers if lever.in_force)

    def to_json(self) -> str:
        """Return the report as JSON; plan and verification as JSON objects of their own."""
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        plain["levers"] = [asdict(lever) for lever in self.levers]
        for name in ("plan", "verification"):
            plain[name] = None if plain[name] is None else json.loads(plain[name].to_json())
        return json.dumps(plain | {"exact": self.exact}, indent=2, default=str)

    def __str__(self) -> str:
        lines = [f"{self.pipeline}: {self._summary()}"]
        for lever in self.levers:
            state = "" if lever.in_force else " (covered by the one after it)"
            kind = "exact" if lever.exact else f"LOSSY: {lever.lossy_reason}"
            lines.append(f"  {_call(lever.action, lever.given)}{state}  [{kind}]")
            lines.extend(f"      {note}" for note in lever.notes)
        if self.left_alone:
            lines.append("  left alone, since it was changed by others:")
            lines.extend(f"      {sentence}" for sentence in self.left_alone)
        if self.plan is not None:
            lines.extend(["", self.plan.explain()])
        if self.verification is not None:
            lines.extend(["", f"Verified: {self.verification.explain()}"])
        return "\n".join(lines)

    def _summary(self) -> str:
        if not self.levers:
            return "nothing switched on"
        return f"{sum(lever.in_force for lever in self.levers)} in force, {'all exact' if self.exact else 'LOSSY'}"


def _call(action: str, options: dict[str, Any]) -> str:
    return f"{action}({', '.join(f'{name}={value!r}' for name, value in options.items())})"


def report_on(pipe: Any, ledger: Any, left_alone: tuple[str, ...] = ()) -> Report:
    """Read a report off a pipeline's ledger (None while nothing is switched on)."""
    levers = []
    for slot, stack in ledger.slots.items() if ledger is not None else ():
        for lever in stack:
            options = lever.options
            levers.append(
                ReportedLever(
                    action=options.action,
                    options=options.as_dict(),
                    given={f.name: value for f in fields(options) if (value := getattr(options, f.name)) != f.default},
                    slot=slot,
                    exact=options.exact,
                    lossy_reason=options.lossy_reason,
                    in_force=lever is stack[-1],
                    notes=tuple(lever.journal.told()) if lever.journal else (),
                )
            )
    return Report(
        pipeline=type(pipe).__name__,
        levers=tuple(levers),
        left_alone=left_alone + (tuple(ledger.left_alone) if ledger is not None else ()),
        plan=ledger.plan if ledger is not None else None,
        verification=ledger.verification if ledger is not None else None,
    )
