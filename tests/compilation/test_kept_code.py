"""What Dynamo looks at in diffusers' networks is the same in another process, and no longer once something changes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_networks_of_diffusers_are_as_they_were_in_another_process(tmp_path):
    """Its hash seed is another; a hook on a linear layer is a difference."""

    def run(what: str, seed: str) -> list[str]:
        command = [sys.executable, "-m", "tests.compilation.looking", what, str(tmp_path)]
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
        return done.stdout.splitlines()

    names = ("sdxl", "decoder", "pixart", "flux", "sd3")
    assert run("make", "1") == [f"{name}: True, None" for name in names]
    assert run("find", "2") == [f"{name}: None, False" for name in names]
