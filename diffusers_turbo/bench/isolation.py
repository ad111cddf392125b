"""A case in a process of its own: nothing of another case in memory, in caches or in compiled code.

python -m diffusers_turbo.bench.isolation RESULTS.json [--trace]
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from ..errors import InvalidOptionError
from .cases import Case
from .results import Results, Status
from .trace import KERNELS, TRACE, WAITS

USERS_FAULT = 64
"""Exit status of the process when no other case could run either; its last line on stderr says why."""

COMPILER_CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
"""Variables that name the folders where torch and Triton keep compiled code between processes."""


def measure_alone(results: Results, case: Case, beside: Path, *, trace: bool = False) -> tuple[Results, bool]:
    """Measure what is left of one case in a new process; return its results, and whether Ctrl-C ended it.

    Whatever became of the process, what it had measured and saved by then is in the results.

    Args:
        results: of the whole job; the rounds that they hold are not repeated. They are not changed.
        case: which case of it.
        beside: the file of the results; the process works in a folder next to it, and traces come to lie there.
        trace: also profile one step.

    Raises:
        InvalidOptionError: the model or the size is not usable.
    """
    job = replace(results.job, cases=(case,), isolate=False)
    rows = [row for row in results.rows if row.case == case.name]
    alone = replace(results, job=job, rows=rows, baseline=case.name, notes=[])
    with tempfile.TemporaryDirectory(dir=beside.parent, prefix=".isolated-") as folder:
        file = Path(folder, "results.json")
        alone.save(file)
        command = [sys.executable, "-m", __name__, str(file), *(["--trace"] if trace else [])]
        # compilers find what they made for an earlier case wherever they look by themselves
        caches = {name: str(Path(folder, name.lower())) for name in COMPILER_CACHES}
        # what libraries print would end up in the midst of our own output
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env={**os.environ, **caches}
        )
        interrupted = False
        try:
            _, errors = process.communicate()
        except KeyboardInterrupt:
            # Ctrl-C reaches the process as well; it saves what it has
            interrupted = True
            _, errors = process.communicate()
        after = Results.load(file)
        for made in (path for end in (KERNELS, TRACE, WAITS) for path in Path(folder).glob(f"*{end}")):
            os.replace(made, beside.parent / made.name)
    if process.returncode == USERS_FAULT:
        raise InvalidOptionError(errors.strip().splitlines()[-1])
    if process.returncode and not interrupted:
        _note_failure(after, *_what_became(process.returncode, errors))
    return after, interrupted


def _note_failure(results: Results, status: Status, reason: str) -> None:
    """Say of the rows that were not done what ended the process; the others keep their result."""
    pending = [row for row in results.rows if row.status in (Status.WAITING, Status.PARTIAL)]
    for row in pending:
        row.status, row.reason = status, reason
    if not pending:
        results.notes.append(f"{results.baseline}, after its last round: {reason}")


def _what_became(returncode: int, errors: str) -> tuple[Status, str]:
    if returncode == -signal.SIGKILL:
        return Status.OUT_OF_MEMORY, "the system ended the process, as it does when host memory runs out"
    lines = errors.strip().splitlines() or [f"exit status {returncode}"]
    return Status.FAILED, lines[-1][:300]


def main(file: str, *flags: str) -> None:
    """Measure what is left in a file of results, into that file."""
    from .session import carry_out

    try:
        carry_out(Results.load(file), Path(file), trace="--trace" in flags)
    except InvalidOptionError as error:
        print(error, file=sys.stderr)
        sys.exit(USERS_FAULT)


if __name__ == "__main__":
    main(*sys.argv[1:])
