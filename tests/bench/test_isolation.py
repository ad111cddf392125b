"""A case in a process of its own: measured, killed, broken, refused, interrupted."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from typing import Any

import pytest

from diffusers_turbo.bench import isolation
from diffusers_turbo.bench.cases import Case
from diffusers_turbo.bench.environment import read_environment
from diffusers_turbo.bench.isolation import USERS_FAULT, main, measure_alone
from diffusers_turbo.bench.job import Job
from diffusers_turbo.bench.results import Results, Row, Status
from diffusers_turbo.bench.running import peak_host_bytes
from diffusers_turbo.bench.session import run
from diffusers_turbo.errors import InvalidOptionError

A, B = Case(name="a"), Case(name="b")
PYTHON = sys.executable

READ = """\
import json, os, signal, sys, time
file = sys.argv[3]
results = json.load(open(file))
def save(*rows):
    for row, changes in zip(results["rows"], rows):
        row.update(changes)
    json.dump(results, open(file, "w"))
MEASURED = {"status": "ok", "seconds": [1.0, 2.0]}
"""


def make_job(**changes: Any) -> Job:
    return Job(**{"model": "none", "cases": (A, B), "steps": 1, "rounds": 2, "pairs": 0, "isolate": True, **changes})


def make_results(*rows: Row, **changes: Any) -> Results:
    return Results(job=make_job(**changes), environment={}, rows=list(rows), started="now", notes=["an older note"])


def row(case: str, batch: int = 1, **changes: Any) -> Row:
    return Row(**{"case": case, "batch": batch, "steps": 1, **changes})


@pytest.fixture
def child(monkeypatch, tmp_path):
    """Let a few lines of Python be the process, in place of this package."""

    def put(lines: str) -> None:
        program = tmp_path / "program"
        program.write_text(f"#!{PYTHON}\n{READ}{lines}\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setattr(isolation.sys, "executable", str(program))

    return put


def test_a_real_process_measures_what_is_left_and_traces_it(model, tmp_path, monkeypatch):
    """The parent has held more memory than the process will: Linux would count that as the process's."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    job = make_job(cases=(A,), steps=2, model=model)
    rest = row("a", status=Status.PARTIAL, reason="interrupted", seconds=[123.0])
    started = Results(job=job, environment=read_environment("cpu", measure=False), rows=[rest], started="now")
    started.save(tmp_path / "results.json")
    ballast = bytearray(b"x") * 2**30
    del ballast
    found = run(job, tmp_path / "results.json", trace=True)
    (measured,) = found.rows
    assert (measured.reason, measured.status) == (None, Status.OK)
    assert (measured.seconds[0], len(measured.seconds)) == (123.0, 2)
    assert measured.first_image_s > 0
    assert 2**27 < measured.peak_host_bytes < peak_host_bytes() - 2**29
    assert (found.notes, found.started) == ([], "now")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"results.json", "a-kernels.txt", "a-trace.json"}
    assert Results.load(tmp_path / "results.json") == found


def test_a_process_out_of_memory_is_a_result_and_the_next_case_goes_on(tmp_path, child):
    child("""
if results["rows"][0]["case"] == "a":
    os.kill(os.getpid(), signal.SIGKILL)
save(MEASURED)
""")
    found = run(make_job(), tmp_path / "results.json", rates=False)
    assert [item.status for item in found.rows] == [Status.OUT_OF_MEMORY, Status.OK]
    assert "host memory runs out" in found.rows[0].reason
    assert found.rows[1].seconds == [1.0, 2.0]
    assert found.finished is not None
    assert Results.load(tmp_path / "results.json") == found
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "program"}


def test_what_a_killed_process_had_measured_is_kept(tmp_path, child):
    child("save(MEASURED, {'seconds': [3.0]}); os.kill(os.getpid(), signal.SIGKILL)")
    started = make_results(row("a", 1), row("b", 1), row("a", 8), row("b", 8), batches=(1, 8))
    after, interrupted = measure_alone(started, A, tmp_path / "results.json")
    assert not interrupted
    assert [(item.case, item.batch, item.status) for item in after.rows] == [
        ("a", 1, Status.OK),
        ("a", 8, Status.OUT_OF_MEMORY),
    ]
    assert after.rows[1].seconds == [3.0]
    assert after.notes == []
    assert [item.status for item in started.rows] == [Status.WAITING] * 4


def test_a_process_killed_after_its_rounds_is_a_note(tmp_path, child):
    child("save(MEASURED); os.kill(os.getpid(), signal.SIGKILL)")
    after, _ = measure_alone(make_results(row("a")), A, tmp_path / "results.json")
    assert (after.rows[0].status, after.rows[0].reason) == (Status.OK, None)
    assert len(after.notes) == 1
    assert after.notes[0].startswith("a, after its last round: the system ended the process")


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ("sys.exit(3)", "exit status 3"),
        ("raise RuntimeError('boom')", "RuntimeError: boom"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", f"exit status -{signal.SIGSEGV.value}"),
    ],
)
def test_a_process_that_fails_is_a_result(tmp_path, child, lines, reason):
    child(lines)
    after, _ = measure_alone(make_results(row("a")), A, tmp_path / "results.json")
    assert (after.rows[0].status, after.rows[0].reason) == (Status.FAILED, reason)


def test_the_process_finds_no_compiled_code_of_another_one(tmp_path, child, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    child("""
for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
    assert os.path.dirname(os.environ[name]) == os.path.dirname(file), name
    assert not os.path.exists(os.environ[name]), name
save(MEASURED)
""")
    after, _ = measure_alone(make_results(row("a")), A, tmp_path / "results.json")
    assert (after.rows[0].status, after.rows[0].reason) == (Status.OK, None)


def test_what_the_process_prints_stays_out_of_our_own_output(tmp_path, child, capfd):
    child("print('a banner', flush=True); save(MEASURED)")
    measure_alone(make_results(row("a")), A, tmp_path / "results.json")
    assert capfd.readouterr().out == ""


def test_a_model_that_no_case_could_use_ends_the_run(tmp_path, child):
    child(f"print('a warning', file=sys.stderr); sys.stderr.write('no such model\\n'); sys.exit({USERS_FAULT})")
    with pytest.raises(InvalidOptionError, match="^no such model$"):
        run(make_job(), tmp_path / "new" / "results.json", rates=False)
    assert [path.name for path in tmp_path.iterdir()] == ["program"]


def test_the_process_says_what_no_case_could_use(tmp_path, capfd):
    file = tmp_path / "results.json"
    Results(job=make_job(model=str(tmp_path / "none"), cases=(A,), isolate=False), rows=[row("a")], started="now").save(
        file
    )
    with pytest.raises(SystemExit) as caught:
        main(str(file))
    assert caught.value.code == USERS_FAULT
    assert capfd.readouterr().err.splitlines()[-1].startswith(f"loading {tmp_path / 'none'}: found no such folder")


@pytest.fixture
def ctrl_c(monkeypatch):
    """Ctrl-C as a terminal sends it: to the waiting parent and to the process, once the process is at work."""
    original = subprocess.Popen.communicate
    sent: list[int] = []

    def communicate(self: subprocess.Popen, *args: Any, **kwargs: Any) -> Any:
        if not sent:
            assert self.stderr.readline() == "at work\n"
            sent.append(self.pid)
            os.kill(self.pid, signal.SIGINT)
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(subprocess.Popen, "communicate", communicate)
    return sent


# a test run in the background has Ctrl-C ignored, and its children inherit that
AT_WORK = "signal.signal(signal.SIGINT, signal.default_int_handler); print('at work', file=sys.stderr, flush=True)"


def test_ctrl_c_keeps_what_the_process_saved_and_the_next_run_goes_on(tmp_path, child, ctrl_c):
    child(f"""
save({{"seconds": [1.0]}})
try:
    {AT_WORK}
    time.sleep(60)
except KeyboardInterrupt:
    save({{"status": "partial", "reason": "interrupted", "first_image_s": 4.0}})
""")
    job, path = make_job(), tmp_path / "results.json"
    found = run(job, path, rates=False)
    assert len(ctrl_c) == 1
    assert [(item.status, item.seconds) for item in found.rows] == [(Status.PARTIAL, [1.0]), (Status.WAITING, [])]
    assert found.rows[0].first_image_s == 4.0
    assert found.finished is None
    assert Results.load(path) == found
    assert {file.name for file in tmp_path.iterdir()} == {"results.json", "program"}

    child('save({"status": "ok", "seconds": results["rows"][0]["seconds"] + [2.0]})')
    whole = run(job, path, rates=False)
    assert [(item.status, item.seconds) for item in whole.rows] == [(Status.OK, [1.0, 2.0]), (Status.OK, [2.0])]
    assert whole.notes == []


def test_ctrl_c_keeps_what_an_earlier_run_had_measured_also_when_it_ends_the_process(tmp_path, child, ctrl_c):
    child(f"{AT_WORK}; signal.signal(signal.SIGINT, signal.SIG_DFL); time.sleep(60)")
    path = tmp_path / "results.json"
    started = make_results(row("a", status=Status.PARTIAL, seconds=[1.0]), row("b"))
    started.environment = read_environment("cpu", measure=False)
    started.save(path)
    found = run(make_job(), path, rates=False)
    assert [(item.status, item.seconds) for item in found.rows] == [(Status.PARTIAL, [1.0]), (Status.WAITING, [])]
    assert found.notes[0] == "an older note"
    assert "the same command goes on" in found.notes[1]


def test_a_complete_run_starts_no_process(tmp_path, child):
    child("sys.exit(3)")
    path = tmp_path / "results.json"
    started = make_results(*(row(name, status=Status.OK, seconds=[1.0, 2.0]) for name in "ab"))
    started.environment = read_environment("cpu", measure=False)
    started.save(path)
    assert run(make_job(), path, rates=False).rows == started.rows
