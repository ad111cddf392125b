"""All of `launched/` in one child process with Triton's interpreter; see conftest.py for why."""

from __future__ import annotations

import pytest
import torch

from diffusers_turbo.kernels.base import triton_reasons
from tests.kernels.child import HERE, run_child

needs_triton = pytest.mark.skipif(bool(triton_reasons()), reason="; ".join(triton_reasons()) or "it is there")


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="the same tests run on the GPU")
def test_on_the_cpu():
    """One child and not one a file: importing torch and Triton takes longer than most files."""
    # Without tests/conftest.py, which imports diffusers.
    options = ["-q", "-p", "no:cacheprovider", f"--confcutdir={HERE}"]
    child = run_child("pytest", *options, str(HERE / "launched"), TRITON_INTERPRET="1")
    assert child.returncode == 0, child.stdout[-6000:] + child.stderr[-2000:]
