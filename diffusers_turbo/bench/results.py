"""What a run measured: one Row a case and batch size, and the file they are kept in, from which a run can go on."""

from __future__ import annotations

import enum
import random
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import InvalidOptionError, in_one_line
from .job import Job
from .reading import refuse
from .strict_json import dumps, loads
from .writing import write_whole

__all__ = ["FORMAT_VERSION", "Job", "Results", "Row", "Status"]

FORMAT_VERSION = 1

# What of the environment changes a timing. Dates, and the rates measured in the run, differ each time.
_LASTING_FACTS = ("device_name", "total_bytes", "driver", "power_limit_w", "os", "cpu", "cpu_cores", "versions")


_RESAMPLES = 2000

_BUSY = 0.9


class Status(enum.StrEnum):
    """What became of a row; running out of memory is a result."""

    OK = "ok"
    PARTIAL = "partial"
    OUT_OF_MEMORY = "out of memory"
    UNSUPPORTED = "unsupported"
    FAILED = "failed"
    WAITING = "not run"


@dataclass(kw_only=True)
class Row:
    """One case at one batch size; filled in while the run goes on.

    Attributes:
        case, batch, steps: what ran.
        status: PARTIAL was interrupted before all its rounds.
        reason: why it did not run, or not to the end.
        load_s, apply_s: loading the pipeline, and throwing the case's switches.
        first_image_s: the first call, with all compilation in it, without load and apply.
        warmup_s: further calls that are not counted.
        seconds: one whole call a round.
        busy_s: how long the GPU computes in such a call, from a profile; None without a GPU.
        peak_allocated_bytes, peak_reserved_bytes: of the device's allocator, in the timed calls.
        peak_host_bytes: of the process.
        report: `pipe.turbo_report()` as data.
        distance: how far the pictures are from the reference.
        verdict: "exact", "close" or "different".
        verdict_reasons: why not exact.
    """

    case: str
    batch: int
    steps: int
    status: Status = Status.WAITING
    reason: str | None = None
    load_s: float | None = None
    apply_s: float | None = None
    first_image_s: float | None = None
    warmup_s: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    busy_s: float | None = None
    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    peak_host_bytes: int | None = None
    report: dict[str, Any] | None = None
    distance: dict[str, Any] | None = None
    verdict: str | None = None
    verdict_reasons: list[str] = field(default_factory=list)

    @property
    def measured(self) -> bool:
        """Whether the timings are this row's result; those from before it failed or ran out of memory are not."""
        return bool(self.seconds) and self.status in (Status.OK, Status.PARTIAL, Status.WAITING)

    @property
    def median_s(self) -> float | None:
        """The median call."""
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def low_s(self) -> float | None:
        """The lower quartile; one round is its own quartiles."""
        return self._quartile(0)

    @property
    def high_s(self) -> float | None:
        """The upper quartile."""
        return self._quartile(2)

    @property
    def median_interval_s(self) -> tuple[float, float] | None:
        """Where the median lies with 95 % confidence: a bootstrap over the rounds (Efron and Tibshirani, 1993)."""
        if len(self.seconds) < 2:
            return None
        draw = random.Random(0)
        medians = [statistics.median(draw.choices(self.seconds, k=len(self.seconds))) for _ in range(_RESAMPLES)]
        cuts = statistics.quantiles(medians, n=40, method="inclusive")
        return cuts[0], cuts[-1]

    @property
    def busy_share(self) -> float | None:
        """The share of the median call in which the GPU computes."""
        return self.busy_s / self.median_s if self.busy_s is not None and self.median_s else None

    @property
    def launch_bound(self) -> bool:
        """Whether the GPU waits for the host for more than a tenth of the call: then the CPU decides how long it is."""
        return self.busy_share is not None and self.busy_share < _BUSY

    @property
    def iterations_per_s(self) -> float | None:
        """Denoising steps a second, over the whole call."""
        return self.steps / self.median_s if self.median_s else None

    @property
    def images_per_s(self) -> float | None:
        """Pictures a second."""
        return self.batch / self.median_s if self.median_s else None

    def _quartile(self, index: int) -> float | None:
        if len(self.seconds) < 2:
            return self.median_s
        return statistics.quantiles(self.seconds, n=4, method="inclusive")[index]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Row:
        """Make a row from its fields as plain data.

        Raises:
            TypeError, KeyError, ValueError: `data` is no such thing.
        """
        times = {name: [float(value) for value in data[name]] for name in ("warmup_s", "seconds")}
        return cls(**{**data, **times, "status": Status(data["status"])})


@dataclass(kw_only=True)
class Results:
    """All rows of a run, with what was asked and where it ran.

    Attributes:
        job: what was asked.
        environment: what `read_environment` found.
        rows: in the order of measuring.
        baseline: the case that the others are compared with; the first one unless named.
        started, finished: UTC, ISO 8601; None while the run goes on.
        notes: what to know beside the numbers.

    Raises:
        InvalidOptionError: the job has no case of the baseline's name.
    """

    job: Job
    environment: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    baseline: str = ""
    started: str
    finished: str | None = None
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        names = [case.name for case in self.job.cases]
        self.baseline = self.baseline or names[0]
        if self.baseline not in names:
            found, needed = f"no case {self.baseline!r} in this run", f"one of {', '.join(names)}"
            raise refuse("choosing the baseline", found, needed, "correct its name")

    def row(self, case: str, batch: int) -> Row:
        """Return the row of a case at a batch size.

        Raises:
            InvalidOptionError: there is none.
        """
        if (found := self._find(case, batch)) is not None:
            return found
        rows = ", ".join(f"{row.case} at {row.batch}" for row in self.rows) or "rows, and there are none yet"
        raise refuse(f"row({case!r}, {batch})", "no such row", f"one of {rows}", "correct the name or the batch size")

    def percent(self, row: Row) -> float | None:
        """Return how much faster a row is than the baseline at its batch size, in percent; negative is slower.

        None where one of the two was not measured.
        """
        baseline = self._find(self.baseline, row.batch)
        if baseline is None or not (baseline.measured and row.measured) or not (baseline.median_s and row.median_s):
            return None
        return 100 * (baseline.median_s / row.median_s - 1)

    def _find(self, case: str, batch: int) -> Row | None:
        return next((row for row in self.rows if (row.case, row.batch) == (case, batch)), None)

    def to_json(self) -> str:
        """Return strict JSON that `from_json` reads back into equal results; tuples come back as lists."""
        return dumps({"format_version": FORMAT_VERSION, **vars(self)})

    @classmethod
    def from_json(cls, text: str) -> Results:
        """Read results written by `to_json`.

        Raises:
            InvalidOptionError: the text is cut off, of another format, or names a case that cannot be any more.
        """
        try:
            data = loads(text)
            version = data.pop("format_version")
            if version != FORMAT_VERSION:
                raise ValueError(f"format_version {version!r}, where this version reads {FORMAT_VERSION}")
            rows = [Row.from_dict(item) for item in data.pop("rows")]
            return cls(**{**data, "job": Job.from_dict(data["job"]), "rows": rows})
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise _no_results("Results.from_json()", in_one_line(error)) from error

    def save(self, path: str | Path) -> None:
        """Write the results, whole or not at all; earlier results there are replaced.

        Raises:
            InvalidOptionError: the folder cannot be written to, or the file there is not one of results.
        """
        if Path(path).exists():
            Results.load(path)
        write_whole(path, self.to_json() + "\n", "the results")

    @classmethod
    def load(cls, path: str | Path) -> Results:
        """Read a file that `save` wrote.

        Raises:
            InvalidOptionError: there is no such file, or it is half-written or not one of results.
        """
        tried = f"reading results from {path}"
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            found = f"{type(error).__name__}: {error.strerror or error}"
            raise refuse(tried, found, "a readable file of results", "correct the path or the file's rights") from error
        except UnicodeDecodeError as error:
            raise _no_results(tried, "bytes that are not UTF-8") from error
        try:
            return cls.from_json(text)
        except InvalidOptionError as error:
            found = "an empty file" if not text.strip() else in_one_line(error.__cause__ or error)
            raise _no_results(tried, found) from error

    def fits(self, job: Job, environment: Mapping[str, Any] | None = None) -> list[str]:
        """Say why a run of `job` cannot go on from these results; an empty list means that it can.

        Args:
            job: what is asked for now.
            environment: where it would run; timings of two machines or two versions of torch do not mix.
        """
        reasons = self.job.differences(job)
        if environment is not None:
            reasons += [
                f"{name}: {old!r} in the results, {new!r} here"
                for name, old, new in _facts_of_both(self.environment, environment)
                if old != new
            ]
        return reasons


def _facts_of_both(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    facts = []
    for name in _LASTING_FACTS:
        before, now = old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            facts += [(key, before.get(key), now.get(key)) for key in sorted(before.keys() | now.keys())]
        else:
            facts.append((name, before, now))
    return facts


def _no_results(tried: str, found: str) -> InvalidOptionError:
    needed = f"a whole file of results, format_version {FORMAT_VERSION}"
    return refuse(tried, found, needed, "move it away or choose another --out; it is left as it is")
