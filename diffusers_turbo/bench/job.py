"""What a run was asked to do, as a value: two runs with equal Jobs can be joined."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..errors import InvalidOptionError
from .cases import Case, Switch
from .reading import refuse
from .strict_json import to_plain

ARCHITECTURE = "arch:"
"""What a job's model starts with when it names an architecture instead of weights."""

TASKS = ("txt2img", "img2img", "inpaint")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a run was asked to do.

    Attributes:
        model: a folder, a Hub id, or "arch:" and a full-size architecture without weights.
        task: "txt2img", "img2img" or "inpaint".
        cases: the configurations, the first one the baseline unless the results name another.
        batches: batch sizes; each case runs at each.
        height, width: pixels; None takes the model's own size.
        steps: denoising steps.
        guidance_scale: None takes the pipeline's default.
        scheduler: short name such as "ddim"; None keeps the model's.
        prompt, seed: of the timed calls.
        rounds: timed calls of each case and batch.
        warmup: calls before them, which are not counted.
        pairs: prompt-and-seed pairs for the distance; 0: none.
        device: torch device.
        dtype: what the pipeline is loaded in where a case names none.
        isolate: each case in a process of its own, instead of all by turns in one.
        decode: False leaves the VAE out.

    Raises:
        InvalidOptionError: a value that no run could follow, or two cases of one name.
    """

    model: str
    task: str = "txt2img"
    cases: tuple[Case, ...]
    batches: tuple[int, ...] = (1,)
    height: int | None = None
    width: int | None = None
    steps: int = 50
    guidance_scale: float | None = None
    scheduler: str | None = None
    prompt: str = "A photo"
    seed: int = 1
    rounds: int = 10
    warmup: int = 1
    pairs: int = 8
    device: str = "cpu"
    dtype: str = "float32"
    isolate: bool = False
    decode: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "cases", tuple(self.cases))
        object.__setattr__(self, "batches", tuple(self.batches))
        if self.task not in TASKS:
            raise _refuse("task", self.task, f"one of {', '.join(TASKS)}")
        for name in ("steps", "rounds"):
            self._check_count(name, getattr(self, name), least=1)
        for name in ("warmup", "pairs"):
            self._check_count(name, getattr(self, name), least=0)
        for name in ("height", "width"):
            if getattr(self, name) is not None:
                self._check_count(name, getattr(self, name), least=1)
        for batch in self.batches:
            self._check_count("batches", batch, least=1)
        if not self.batches or len(set(self.batches)) < len(self.batches):
            raise _refuse("batches", self.batches, "at least one batch size, each once")
        names = [case.name for case in self.cases]
        if not names or len(set(names)) < len(names):
            raise _refuse("cases", tuple(names), "at least one case, each name once")

    @staticmethod
    def _check_count(name: str, value: object, *, least: int) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise _refuse(name, value, f"a whole number from {least} on")

    def dtype_of(self, case: str) -> str:
        """Return the dtype that a case of this job computes in, by its name: of its autocast, else of its weights."""
        found = next((item for item in self.cases if item.name == case), None)
        return (found and (found.autocast or found.dtype)) or self.dtype

    def as_dict(self) -> dict[str, Any]:
        """Return plain data, from which `from_dict` makes an equal Job."""
        plain: dict[str, Any] = to_plain(self)
        return plain

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Job:
        """Make a Job from what `as_dict` gave.

        Raises:
            TypeError, KeyError: `data` is no such thing.
            InvalidOptionError: a value does not fit, such as an action there is no longer.
        """
        cases = tuple(
            Case(**{**item, "switches": tuple(Switch(**switch) for switch in item["switches"])})
            for item in data["cases"]
        )
        return cls(**{**data, "cases": cases})

    def differences(self, other: Job) -> list[str]:
        """Say where `other` asks for something else, one sentence a field; an empty list means nowhere."""
        mine, theirs = self.as_dict(), other.as_dict()
        reasons = [
            f"{field.name}: {mine[field.name]!r} in the results, {theirs[field.name]!r} asked for now"
            for field in fields(self)
            if field.name != "cases" and mine[field.name] != theirs[field.name]
        ]
        old, new = ({case.name: case for case in job.cases} for job in (self, other))
        if list(old) != list(new):
            reasons.append(f"cases: {', '.join(old)} in the results, {', '.join(new)} asked for now")
        for name in (name for name in old if name in new):
            reasons.extend(_case_differences(old[name], new[name]))
        return reasons


def _case_differences(old: Case, new: Case) -> list[str]:
    mine, theirs = to_plain(old), to_plain(new)
    return [
        f"case {old.name}, {key}: {mine[key]!r} in the results, {theirs[key]!r} asked for now"
        for key in mine
        # a reworded description measures the same thing
        if key != "description" and mine[key] != theirs[key]
    ]


def _refuse(name: str, value: object, needed: str) -> InvalidOptionError:
    return refuse(f"Job({name}={value!r})", f"{name} = {value!r}", needed, f"correct {name}")
