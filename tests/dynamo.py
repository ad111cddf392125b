"""Compiled code of one test must not be another's."""

from __future__ import annotations

import torch
from torch._dynamo.utils import counters

_TRIES = 10


def reset() -> None:
    """Forget all compiled code and counts.

    torch goes through a table of backends in its reset, and any import of a module with a `torch.compiler.disable` in
    it, on whatever thread, adds a line to that table: once in thousands of tests it ends with "dictionary changed size
    during iteration". It can be called again then.
    """
    for left in reversed(range(_TRIES)):
        try:
            torch._dynamo.reset()
            break
        except RuntimeError as error:
            if "changed size during iteration" not in str(error) or not left:
                raise
    counters.clear()
