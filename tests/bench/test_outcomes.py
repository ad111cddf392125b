"""What fails in a run is a result, gives its memory back, and the other cases go on."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusers_turbo.actions.apply import APPLY
from diffusers_turbo.actions.undo import Journal
from diffusers_turbo.bench import session
from diffusers_turbo.bench.cases import Case, Switch, builtin_cases
from diffusers_turbo.bench.results import Row, Status
from diffusers_turbo.bench.running import Contender, outcomes_in
from diffusers_turbo.errors import InvalidOptionError
from diffusers_turbo.planning import options as opt
from tests.bench.runs import CHANNELS_LAST, SDPA, STOCK, make_job, measure


@pytest.fixture
def failing(monkeypatch) -> None:
    """Channels-last breaks when it is applied; a case named hungry runs out of memory in its second round."""

    def broken(pipe: Any, options: Any) -> Journal:
        raise RuntimeError("boom\nin two lines")

    original = Contender.round

    def hungry(self: Contender, row: Row) -> float:
        if self.case.name == "hungry" and row.seconds:
            raise torch.OutOfMemoryError("tried to allocate 64.00 GiB")
        return original(self, row)

    monkeypatch.setitem(APPLY, opt.ChannelsLast, broken)
    monkeypatch.setattr(Contender, "round", hungry)


def test_failures_are_results_and_the_others_go_on(model, tmp_path, log, failing):
    too_many = Case(name="slices", switches=(Switch(action="enable_attention_slicing", options={"slice_size": 99}),))
    cases = (STOCK, Case(name="hungry"), CHANNELS_LAST, builtin_cases()["xformers"], too_many, SDPA)
    found = measure(make_job(model, *cases), tmp_path)
    rows = {row.case: row for row in found.rows}
    assert {name: row.status for name, row in rows.items()} == {
        "stock": Status.OK,
        "hungry": Status.OUT_OF_MEMORY,
        "channels-last": Status.FAILED,
        "xformers": Status.UNSUPPORTED,
        "slices": Status.UNSUPPORTED,
        "sdpa": Status.OK,
    }
    assert rows["channels-last"].reason.startswith("ActionFailedError: ")
    assert "boom in two lines" in rows["channels-last"].reason
    assert "xFormers" in rows["xformers"].reason
    assert "slice_size=99" in rows["slices"].reason
    assert rows["hungry"].reason == (
        "beside 2 other configurations in memory (--isolate runs each alone): tried to allocate 64.00 GiB"
    )
    assert len(rows["hungry"].seconds) == 1
    assert not rows["hungry"].measured
    assert [len(rows[name].seconds) for name in ("stock", "sdpa")] == [3, 3]
    assert found.finished is not None
    assert found.percent(rows["hungry"]) is None


def test_out_of_memory_alone_at_a_larger_batch_leaves_the_smaller_one(model, tmp_path, monkeypatch):
    original = Contender.first

    def first(self: Contender, row: Row) -> None:
        if row.batch == 2:
            torch.empty(2**60)  # torch's own error for host memory
        original(self, row)

    monkeypatch.setattr(Contender, "first", first)
    found = measure(make_job(model, batches=(1, 2), pairs=1, rounds=1), tmp_path)
    one, two = found.rows
    assert (one.status, one.verdict) == (Status.OK, "exact")
    assert two.status is Status.OUT_OF_MEMORY
    assert "DefaultCPUAllocator" in two.reason
    assert "beside" not in two.reason


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (MemoryError(), Status.OUT_OF_MEMORY, "MemoryError"),
        (KeyError("sample"), Status.FAILED, "KeyError: 'sample'"),
        (ImportError("no module x"), Status.FAILED, "ImportError: no module x"),
    ],
)
def test_errors_and_their_outcomes(error, status, reason):
    rows = [Row(case="a", batch=batch, steps=1) for batch in (1, 2)]
    with outcomes_in(*rows):
        raise error
    assert [(row.status, row.reason) for row in rows] == [(status, reason)] * 2


def test_what_concerns_the_whole_run_and_ctrl_c_are_no_outcome():
    row = Row(case="a", batch=1, steps=1)
    for error in (InvalidOptionError("no such model"), KeyboardInterrupt()):
        with pytest.raises(type(error)), outcomes_in(row):
            raise error
    assert row.status is Status.WAITING


def test_a_case_s_memory_is_given_back_before_the_next_one_is_looked_at(model, tmp_path, monkeypatch):
    seen: dict[str, weakref.ref[Any]] = {}
    alive: dict[str, list[str]] = {}

    def look(contender: Contender, folder: Path) -> None:
        alive[contender.case.name] = [name for name, pipe in seen.items() if pipe() is not None]
        seen[contender.case.name] = weakref.ref(contender.pipe)

    monkeypatch.setattr(session, "trace_step", look)
    measure(make_job(model, STOCK, SDPA, rounds=1), tmp_path, trace=True)
    assert alive == {"stock": [], "sdpa": []}


@pytest.mark.parametrize("method", ["first", "round"])
def test_the_memory_of_a_case_that_failed_is_given_back_at_once(model, tmp_path, monkeypatch, method):
    pipes: list[weakref.ref[Any]] = []
    alive: list[bool] = []
    free, original = session.free_memory, getattr(Contender, method)

    def fail(self: Contender, row: Row) -> Any:
        if self.case.name == "hungry":
            pipes.append(weakref.ref(self.pipe))
            raise torch.OutOfMemoryError("enough")
        return original(self, row)

    def free_and_look(device: torch.device) -> None:
        free(device)
        alive.extend(pipe() is not None for pipe in pipes)

    monkeypatch.setattr(Contender, method, fail)
    monkeypatch.setattr(session, "free_memory", free_and_look)
    found = measure(make_job(model, Case(name="hungry"), STOCK, rounds=2), tmp_path)
    assert [row.status for row in found.rows] == [Status.OUT_OF_MEMORY, Status.OK]
    assert len(pipes) == 1
    assert set(alive) == {False}
