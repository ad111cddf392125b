"""Where tests that launch kernels run: on a GPU in this process, else in children with Triton's interpreter on.

Triton decides once, when it is imported, whether its functions are interpreted, and torch, xFormers or another test may
have imported it before. Setting TRITON_INTERPRET here would thus come too late or leak into whatever is imported next.
So without a GPU, `launched/` is hidden from this process, and `test_interpreted.py` runs each of its files in a child
that has the variable from its start. To have one such test at hand: `TRITON_INTERPRET=1 pytest tests/kernels/launched`.
"""

from __future__ import annotations

import pytest
import torch

from diffusers_turbo.kernels.base import interpreting

if not (torch.cuda.is_available() or interpreting()):
    collect_ignore = ["launched"]


@pytest.fixture
def device() -> str:
    """Where a launched kernel's tensors live."""
    return "cpu" if interpreting() else "cuda"
