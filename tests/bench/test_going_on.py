"""Nothing measured is lost: Ctrl-C at any moment, a full disk, and the same command going on from there."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from diffusers_turbo.bench.results import Results, Status
from diffusers_turbo.errors import InvalidOptionError
from tests.bench.runs import SDPA, STOCK, make_job, measure


def test_ctrl_c_keeps_what_was_measured_and_the_same_command_goes_on(model, tmp_path, log):
    job, path = make_job(model, STOCK, SDPA, warmup=2), tmp_path / "results.json"
    log.fail_at = 9  # load, first and warm-up of both, then the second round of sdpa
    found = measure(job, tmp_path)
    assert [len(row.seconds) for row in found.rows] == [2, 1]
    assert [row.status for row in found.rows] == [Status.PARTIAL] * 2
    assert "run the same command again" in found.rows[0].reason
    assert found.finished is None
    assert found.notes == ["interrupted before everything was measured; the same command goes on from here"]
    assert Results.load(path) == found

    log.calls.clear()
    told = []
    whole = measure(job, tmp_path, progress=lambda *what: told.append(what))
    assert [call for call in log.calls if call[0] != "load"][4:] == [
        ("round", "sdpa", 1),
        ("round", "stock", 1),
        ("round", "sdpa", 1),
    ]
    assert told[0] == ("loading stock", 3, 6)
    for before, after in zip(found.rows, whole.rows, strict=True):
        assert after.seconds[: len(before.seconds)] == before.seconds
        assert len(after.seconds) == 3
        assert len(after.warmup_s) == 1
        assert (after.status, after.reason) == (Status.OK, None)
    assert whole.notes == []
    assert whole.finished is not None
    assert whole.started == found.started

    log.calls.clear()
    again = measure(job, tmp_path)
    assert log.calls == []
    assert again.rows == whole.rows


# of load, first, load, first, round, round, round, round, compare, compare
@pytest.mark.parametrize("moment", [0, 3, 5, 9])
def test_an_interruption_at_any_moment_loses_nothing(model, tmp_path, log, moment):
    job = make_job(model, STOCK, SDPA, rounds=2, pairs=1)
    log.fail_at = moment
    found = measure(job, tmp_path)
    assert len(log.calls) == moment + 1
    assert found.finished is None
    assert Results.load(tmp_path / "results.json") == found
    assert sum(len(row.seconds) for row in found.rows) == min(max(moment - 4, 0), 4)
    whole = measure(job, tmp_path)
    for before, after in zip(found.rows, whole.rows, strict=True):
        assert (after.status, after.verdict, len(after.seconds)) == (Status.OK, "exact", 2)
        assert after.seconds[: len(before.seconds)] == before.seconds
    assert len([call for call in log.calls if call == ("compare",)]) == (3 if moment >= 8 else 2)


def test_a_trace_can_be_asked_for_afterwards(model, tmp_path, log):
    job = make_job(model, steps=2, rounds=1)
    before = measure(job, tmp_path)
    after = measure(job, tmp_path, trace=True)
    assert after.rows == before.rows
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"results.json", "stock-kernels.txt", "stock-trace.json"}


def test_a_trace_that_cannot_be_made_is_a_note(model, tmp_path):
    job = make_job(model, STOCK, SDPA, rounds=1)
    for _ in range(2):
        found = measure(job, tmp_path, trace=True)
        assert [row.status for row in found.rows] == [Status.OK] * 2
        assert [note.partition(": found 1 step;")[0] for note in found.notes] == [
            "no trace of stock: tracing one step of stock",
            "no trace of sdpa: tracing one step of sdpa",
        ]


def test_a_full_disk_ends_the_run_and_what_was_saved_stays(model, tmp_path, monkeypatch):
    path, original = tmp_path / "results.json", Results.save

    def save(self: Results, path: Path) -> None:
        if any(len(row.seconds) == 2 for row in self.rows):
            monkeypatch.setattr("os.replace", full)
        original(self, path)

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Results, "save", save)
    with pytest.raises(InvalidOptionError, match="writing the results to .*No space left on device"):
        measure(make_job(model), tmp_path)
    assert list(tmp_path.iterdir()) == [path]
    assert [len(row.seconds) for row in Results.load(path).rows] == [1]


def test_a_model_that_has_gone_leaves_what_was_measured(model, tmp_path, log):
    shutil.copytree(model, tmp_path / "model")
    job, path = make_job(str(tmp_path / "model")), tmp_path / "results.json"
    log.fail_at = 3
    found = measure(job, tmp_path)
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(InvalidOptionError, match="no such folder"):
        measure(job, tmp_path)
    assert [row.seconds for row in Results.load(path).rows] == [row.seconds for row in found.rows]
    assert len(found.rows[0].seconds) == 1
