"""A whole run: every case in turn, round after round, saved as it goes, so that nothing measured is ever lost."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import torch

from ..errors import InvalidOptionError, TurboError, in_one_line
from ..facts.probing import require_device
from ..verification.check import Yardstick
from ..verification.inputs import make_inputs
from .cases import Case
from .environment import read_environment
from .isolation import measure_alone
from .job import ARCHITECTURE, Job
from .loading import load_for
from .reading import refuse
from .results import Results, Row, Status
from .running import Contender, free_memory, outcomes_in, size_of
from .tasks import size_inputs, task_inputs
from .trace import trace_step, trace_waits

Progress = Callable[[str, int, int], None]
"""Told what is being done, how many rounds are done and how many there will be."""

_INTERRUPTED = "interrupted before everything was measured; the same command goes on from here"


def run(
    job: Job,
    path: Path,
    *,
    baseline: str = "",
    progress: Progress | None = None,
    trace: bool = False,
    rates: bool = True,
) -> Results:
    """Measure every case of a job, going on from earlier results in `path` if they are of the same job.

    Results are saved after every round. On Ctrl-C the rows that were running are marked partial, everything is saved
    and the results are returned, with a note; calling again goes on from there.

    Args:
        job: what to measure.
        path: the file of results.
        baseline: the case that the others are compared with; by default the first.
        progress: told what is going on.
        trace: also profile one step of each case, into the folder of `path`.
        rates: also measure what the device can do, about two seconds.

    Raises:
        InvalidOptionError: the model, size, device or file is not usable, or the file holds results of another job.
    """
    require_device(job.device)
    absent = [place for place in (path, *path.parents) if not place.exists()]
    results = _open_results(job, path, baseline, rates)
    results.save(path)  # a folder that cannot be written to is better known now
    try:
        return carry_out(results, path, progress=progress, trace=trace)
    except InvalidOptionError:
        if path in absent and not any(row.seconds for row in results.rows):
            _remove(absent)
        raise


def carry_out(results: Results, path: Path, *, progress: Progress | None = None, trace: bool = False) -> Results:
    """Measure what is left of results that are saved in `path`; Ctrl-C and the arguments are as in `run`.

    Raises:
        InvalidOptionError: the model, size or file is not usable.
    """
    try:
        Session(results, path, progress or (lambda doing, done, total: None), trace).measure()
    except KeyboardInterrupt:
        _mark_interrupted(results)
    else:
        results.finished = _now()
    results.save(path)
    return results


class Session:
    """One run in progress: its results, where they are saved, whom to tell."""

    def __init__(self, results: Results, path: Path, progress: Progress, trace: bool) -> None:
        """Take over results, new or half done."""
        self.results, self.path, self.progress, self.trace = results, path, progress, trace
        self.job = results.job
        self._yardsticks: dict[str, Yardstick] = {}

    def measure(self) -> None:
        """Measure what is not measured yet."""
        if self.job.isolate:
            self._one_after_another()
        else:
            self._by_turns()
        self._tell("measured")

    def _by_turns(self) -> None:
        """A, B, C, A, B, C ...: a busy moment of the machine hits all alike."""
        contenders: dict[str, Contender] = {}
        for batch in self.job.batches:
            waiting = [row for row in self.results.rows if row.batch == batch and not self._is_complete(row)]
            for row in waiting:
                self._start(row, contenders)
            for number in range(self.job.rounds):
                for row in waiting:
                    self._take_turn(row, number, contenders)
                self.results.save(self.path)
            for row in waiting:
                if row.status is Status.WAITING:
                    row.status, row.reason = Status.OK, None
            self.results.save(self.path)
            for row in waiting:
                self._profile(row, contenders)
        for case in self.job.cases:
            self._look_closer(case, contenders)
            free_memory(torch.device(self.job.device))
            self.results.save(self.path)

    def _start(self, row: Row, contenders: dict[str, Contender]) -> None:
        """Load the row's case if no earlier batch did, and warm it up."""
        case = next(case for case in self.job.cases if case.name == row.case)
        row.status, row.reason, row.warmup_s = Status.WAITING, None, []
        with outcomes_in(row):
            if row.case not in contenders:
                self._tell(f"loading {row.case}")
                contenders[row.case] = Contender(self.job, case)
            self._tell(f"{row.case}, batch {row.batch}, warm-up")
            # no name for the contender here, which would keep one that fails alive
            contenders[row.case].first(row)
            for _ in range(1, self.job.warmup):
                aside = Row(case=row.case, batch=row.batch, steps=row.steps)
                row.warmup_s.append(contenders[row.case].round(aside))
        self._after_failure(row, contenders)
        self.results.save(self.path)

    def _take_turn(self, row: Row, number: int, contenders: dict[str, Contender]) -> None:
        if row.status is not Status.WAITING or len(row.seconds) > number:
            return
        self._tell(f"{row.case}, batch {row.batch}, round {number + 1} of {self.job.rounds}")
        with outcomes_in(row):
            row.seconds.append(contenders[row.case].round(row))
        self._after_failure(row, contenders)

    def _profile(self, row: Row, contenders: dict[str, Contender]) -> None:
        """See whether GPU or host decided how long the calls took, once all were timed."""
        if row.status is not Status.OK or row.case not in contenders or not is_cuda(self.job.device):
            return
        self._tell(f"{row.case}, batch {row.batch}, profile")
        try:
            contenders[row.case].profile(row)
        except Exception as error:
            self._note(f"no profile of {row.case}, batch {row.batch}: {_told(error)}")

    def _after_failure(self, row: Row, contenders: dict[str, Contender]) -> None:
        """Make room for the others, if the row failed."""
        if row.status is Status.WAITING:
            return
        others = len(contenders.keys() - {row.case})
        if row.status is Status.OUT_OF_MEMORY and others:
            row.reason = f"beside {others} other configurations in memory (--isolate runs each alone): {row.reason}"
        if not any(other.measured for other in self.results.rows if other.case == row.case):
            contenders.pop(row.case, None)
        free_memory(torch.device(self.job.device))

    def _one_after_another(self) -> None:
        for case in self.job.cases:
            rows = [row for row in self.results.rows if row.case == case.name]
            if all(map(self._is_complete, rows)) and not self._is_unjudged(rows[0]) and not self.trace:
                continue
            self._tell(f"{case.name}, in a process of its own")
            after, interrupted = measure_alone(self.results, case, self.path, trace=self.trace)
            found = {(row.case, row.batch): row for row in after.rows}
            self.results.rows = [found.get((row.case, row.batch), row) for row in self.results.rows]
            for note in after.notes:
                self._note(note)
            if interrupted:
                raise KeyboardInterrupt
            self.results.save(self.path)

    def _look_closer(self, case: Case, contenders: dict[str, Contender]) -> None:
        """Profile and judge a case once all times are taken, which stand without it."""
        row = self.results.row(case.name, self.job.batches[0])
        contender = contenders.pop(case.name, None)  # freed before the next one is judged
        unjudged = self._is_unjudged(row)
        if not unjudged and not (self.trace and row.measured):
            return
        self._tell(f"{case.name}, a closer look")
        try:
            # a case that an earlier run had timed is not in memory
            contender = contender or Contender(self.job, case)
        except Exception as error:
            self._note(f"{case.name} could not be loaded again: {_told(error)}")
            return
        try:
            if self.trace:
                trace_step(contender, self.path.parent)
                if is_cuda(self.job.device):
                    trace_waits(contender, self.path.parent)
        except Exception as error:
            self._note(f"no trace of {case.name}: {_told(error)}")
        try:
            if unjudged:
                self._judge(contender, row)
        except Exception as error:
            row.verdict_reasons = [f"not compared: {_told(error)}"]

    def _judge(self, contender: Contender, row: Row) -> None:
        """Measure the distance of a case's pictures from the reference."""
        self._tell(f"{row.case}, distance from the reference")
        found = self._yardstick(contender).measure(contender.pipe, autocast=contender.case.autocast)
        plain = found.as_dict()
        more = ("dtype", "stock", "ssim", "flip", "reference", "steps")
        row.distance = {**plain["ours"], **{name: plain[name] for name in more}}
        row.verdict, row.verdict_reasons = found.verdict.level, list(found.verdict.reasons)

    def _yardstick(self, contender: Contender) -> Yardstick:
        """The reference: from the model in fp32; random weights exist in the case's dtype only, so from those."""
        job, case = self.job, contender.case
        random_weights = job.model.startswith(ARCHITECTURE)
        dtype = (case.dtype or job.dtype) if random_weights else "float32"
        if dtype not in self._yardsticks:
            plain = load_for(job, Case(name="reference", dtype=dtype))
            size, more = size_of(plain, job), size_inputs(plain, job.height, job.width)
            inputs = make_inputs(
                job.prompt if job.pairs == 1 else None,
                job.pairs,
                steps=job.steps,
                guidance_scale=job.guidance_scale,
                more=lambda batch: {**more, **task_inputs(job.task, *size, batch)},
            )
            self._yardsticks.clear()  # each holds a copy of the model in host memory
            self._yardsticks[dtype] = Yardstick(plain, inputs)
        return self._yardsticks[dtype]

    def _is_complete(self, row: Row) -> bool:
        return row.status is Status.OK and len(row.seconds) >= self.job.rounds

    def _is_unjudged(self, row: Row) -> bool:
        wanted = bool(self.job.pairs) and self.job.decode and row.measured
        return wanted and row.verdict is None and not row.verdict_reasons

    def _note(self, note: str) -> None:
        if note not in self.results.notes:
            self.results.notes.append(note)

    def _tell(self, doing: str) -> None:
        rounds, rows = self.job.rounds, self.results.rows
        left = [rounds - len(row.seconds) for row in rows if row.status in (Status.WAITING, Status.PARTIAL)]
        self.progress(doing, len(rows) * rounds - sum(left), len(rows) * rounds)


def _open_results(job: Job, path: Path, baseline: str, rates: bool) -> Results:
    if path.exists():
        results = Results.load(path)
        if reasons := results.fits(job, read_environment(job.device, measure=False)):
            found = f"results of another run ({'; '.join(reasons)})"
            raise refuse(f"going on from {path}", found, "the same job", "choose another --out, or move it away")
        notes = [note for note in results.notes if note != _INTERRUPTED]
        return replace(results, finished=None, baseline=baseline or results.baseline, notes=notes)
    rows = [Row(case=case.name, batch=batch, steps=job.steps) for batch in job.batches for case in job.cases]
    environment = read_environment(job.device, measure=rates)
    return Results(job=job, environment=environment, rows=rows, baseline=baseline, started=_now())


def _mark_interrupted(results: Results) -> None:
    for row in results.rows:
        if row.status is Status.WAITING and row.seconds:
            row.status, row.reason = Status.PARTIAL, "interrupted; run the same command again to go on"
    if _INTERRUPTED not in results.notes:
        results.notes.append(_INTERRUPTED)


def _remove(places: list[Path]) -> None:
    """Remove a file and then the folders made for it, from the inside out, as far as they are empty."""
    places[0].unlink()
    with contextlib.suppress(OSError):
        for folder in places[1:]:
            folder.rmdir()


def _told(error: Exception) -> str:
    # the text of our own errors says what was tried, found and needed
    return " ".join(str(error).split()) if isinstance(error, TurboError) else in_one_line(error, 300)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def is_cuda(device: str) -> bool:
    """Whether the profiler can tell what a device does."""
    return torch.device(device).type == "cuda"
