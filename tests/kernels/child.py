"""A Python process of its own, told apart from this one by what Triton is told in its environment."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def run_child(module: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m module` from the repository's root; nothing an outer pytest or xdist has set reaches it."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TRITON_"))}
    paths = [str(HERE.parents[1]), *filter(None, sys.path)]
    kept |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)} | environment
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, env=kept, cwd=HERE.parents[1], capture_output=True, text=True, timeout=280)
