from __future__ import annotations

import gc

import pytest
import torch
from torch._dynamo.utils import counters


@pytest.fixture(autouse=True)
def fresh_dynamo():
    """Compiled code and counts of one test must not be another's."""
    _reset()
    yield
    _reset()


def _reset():
    # it goes through a table of backends that a collection in the middle of the loop would make shorter
    gc.disable()
    try:
        torch._dynamo.reset()
    finally:
        gc.enable()
    counters.clear()
