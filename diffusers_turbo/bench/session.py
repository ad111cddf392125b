"""A whole run: every case in turn, round after round, saved as it goes, so that nothing measured is ever lost."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch

from ..errors import InvalidOptionError, NotSupportedError
from ..verification.check import Yardstick
from ..verification.inputs import make_inputs
from .cases import Case
from .environment import read_environment
from .isolation import measure_alone
from .job import Job
from .loading import ARCHITECTURE, load_for, require_device
from .reading import refuse
from .results import Results, Row, Status
from .running import Contender, free_memory, outcomes_in, size_of
from .tasks import size_inputs, task_inputs
from .trace import trace_step

Progress = Callable[[str, int, int], None]
"""Told what is being done, how many calls are done and how many there will be."""


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
    results = _open_results(job, path, baseline, rates)
    fresh = not path.exists()
    results.save(path)  # a folder that cannot be written to is better known now
    session = Session(results, path, progress or (lambda doing, done, total: None), trace)
    try:
        session.measure()
    except KeyboardInterrupt:
        _mark_interrupted(results)
    except InvalidOptionError:
        if fresh:
            path.unlink()
        raise
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
        self.total = len(results.rows) * (self.job.rounds + self.job.warmup)
        self.done = 0
        self._yardsticks: dict[str, Yardstick] = {}

    def measure(self) -> None:
        """Measure what is not measured yet."""
        if self.job.isolate:
            self._one_after_another()
        else:
            self._by_turns()

    def _by_turns(self) -> None:
        """A, B, C, A, B, C ...: a busy moment of the machine hits all alike."""
        contenders: dict[str, Contender] = {}
        for batch in self.job.batches:
            rows = [row for row in self.results.rows if row.batch == batch]
            waiting = [row for row in rows if not self._is_complete(row)]
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
        for name, contender in list(contenders.items()):
            if self.trace:
                self._trace(contender)
            self._judge(contender, self.results.row(name, self.job.batches[0]))
            del contenders[name], contender
            free_memory(torch.device(self.job.device))
            self.results.save(self.path)

    def _start(self, row: Row, contenders: dict[str, Contender]) -> None:
        """Load the row's case if no earlier batch did, and warm it up."""
        case = next(case for case in self.job.cases if case.name == row.case)
        row.status, row.reason = Status.WAITING, None
        with outcomes_in(row):
            if row.case not in contenders:
                self._tell(f"loading {row.case}", 0)
                contenders[row.case] = Contender(self.job, case)
            contender = contenders[row.case]
            for number in range(max(self.job.warmup, 1)):
                self._tell(f"{row.case}, batch {row.batch}, warm-up", 0)
                if number == 0:
                    contender.first(row)
                else:
                    row.warmup_s.append(contender.round(Row(case=row.case, batch=row.batch, steps=row.steps)))
                self._tell(f"{row.case}, batch {row.batch}", 1)
        if row.status is not Status.WAITING:
            self._explain_memory(row, contenders)
            self._tell(f"{row.case}: {row.status}", self.job.rounds + self.job.warmup)
            if row.batch == self.job.batches[0]:
                contenders.pop(row.case, None)
            free_memory(torch.device(self.job.device))
        self.results.save(self.path)

    def _take_turn(self, row: Row, number: int, contenders: dict[str, Contender]) -> None:
        if row.status is not Status.WAITING or len(row.seconds) > number:
            return
        with outcomes_in(row):
            row.seconds.append(contenders[row.case].round(row))
        self._tell(f"{row.case}, batch {row.batch}, round {number + 1} of {self.job.rounds}", 1)

    def _one_after_another(self) -> None:
        for case in self.job.cases:
            rows = [row for row in self.results.rows if row.case == case.name]
            if all(self._is_complete(row) for row in rows):
                continue
            self._tell(f"{case.name}, in a process of its own", 0)
            measured, interrupted = measure_alone(self.job, case, self.path)
            for row in rows:
                found = next((other for other in measured if other.batch == row.batch), None)
                if found is not None:
                    self.results.rows[self.results.rows.index(row)] = found
            if interrupted:
                raise KeyboardInterrupt
            self._tell(case.name, len(rows) * (self.job.rounds + self.job.warmup))
            self.results.save(self.path)

    def _trace(self, contender: Contender) -> None:
        self._tell(f"{contender.case.name}, profiling one step", 0)
        try:
            trace_step(contender, self.path.parent)
        except NotSupportedError as error:
            self.results.notes.append(str(error))

    def _judge(self, contender: Contender, row: Row) -> None:
        """Measure the distance of a case's pictures from the reference, once all times are taken."""
        if not self.job.pairs or not self.job.decode or not row.measured:
            return
        self._tell(f"{row.case}, distance from the reference", 0)
        try:
            found = self._yardstick(contender).measure(contender.pipe, autocast=contender.case.autocast)
        except KeyboardInterrupt:
            raise
        except Exception as error:  # the times stand without it
            row.verdict_reasons = [f"not compared: {type(error).__name__}: {' '.join(str(error).split())[:200]}"]
            return
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

    def _explain_memory(self, row: Row, contenders: dict[str, Contender]) -> None:
        others = len(contenders) - (row.case in contenders)
        if row.status is Status.OUT_OF_MEMORY and others:
            row.reason = f"beside {others} other configurations in memory (--isolate runs each alone): {row.reason}"

    def _tell(self, doing: str, more: int) -> None:
        self.done = min(self.done + more, self.total)
        self.progress(doing, self.done, self.total)


def _open_results(job: Job, path: Path, baseline: str, rates: bool) -> Results:
    environment = read_environment(job.device, measure=rates)
    if path.exists():
        results = Results.load(path)
        if reasons := results.fits(job, environment):
            found = f"results of another run ({'; '.join(reasons)})"
            raise refuse(f"going on from {path}", found, "the same job", "choose another --out, or move it away")
        results.finished = None
        results.baseline = baseline or results.baseline
        return results
    rows = [Row(case=case.name, batch=batch, steps=job.steps) for batch in job.batches for case in job.cases]
    return Results(job=job, environment=environment, rows=rows, baseline=baseline, started=_now())


def _mark_interrupted(results: Results) -> None:
    for row in results.rows:
        if row.status is Status.WAITING and row.seconds:
            row.status, row.reason = Status.PARTIAL, "interrupted; run the same command again to go on"
    note = "interrupted: some rows hold fewer rounds than asked for"
    if note not in results.notes:
        results.notes.append(note)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
