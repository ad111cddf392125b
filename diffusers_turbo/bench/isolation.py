"""A case in a process of its own: nothing of another case in memory, in caches or in compiled code.

python -m diffusers_turbo.bench.isolation JOB.json RESULTS.json
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from .cases import Case
from .job import Job
from .results import Results, Row, Status
from .strict_json import dumps, loads


def measure_alone(job: Job, case: Case, beside: Path) -> tuple[list[Row], bool]:
    """Measure one case of a job in a new process; return its rows, whatever became of it, and whether Ctrl-C ended it.

    Args:
        job: the whole job.
        case: which case of it.
        beside: the results file; the process works in a folder next to it.
    """
    alone = replace(job, cases=(case,), isolate=False)
    with tempfile.TemporaryDirectory(dir=beside.parent, prefix=".isolated-") as folder:
        asked, answer = Path(folder, "job.json"), Path(folder, "results.json")
        asked.write_text(dumps(alone.as_dict()), encoding="utf-8")
        command = [sys.executable, "-m", __name__, str(asked), str(answer)]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        interrupted = False
        try:
            _, errors = process.communicate()
        except KeyboardInterrupt:
            # Ctrl-C reaches the process as well; it saves what it has
            interrupted = True
            _, errors = process.communicate()
        if answer.exists() and process.returncode == 0:
            return Results.load(answer).rows, interrupted
        if interrupted:
            return [], True
    status, reason = _what_became(process.returncode, errors)
    failed = [Row(case=case.name, batch=batch, steps=job.steps, status=status, reason=reason) for batch in job.batches]
    return failed, False


def _what_became(returncode: int, errors: str) -> tuple[Status, str]:
    if returncode == -signal.SIGKILL:
        return Status.OUT_OF_MEMORY, "the system ended the process, as it does when host memory runs out"
    lines = errors.strip().splitlines() or [f"exit status {returncode}"]
    return Status.FAILED, lines[-1][:300]


def main(asked: str, answer: str) -> None:
    """Measure the job in the first file into the second."""
    from .session import run

    run(Job.from_dict(loads(Path(asked).read_text(encoding="utf-8"))), Path(answer), rates=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
