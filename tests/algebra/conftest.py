from __future__ import annotations

import pytest

from diffusers_turbo.graphs.capture import CAPTURES
from tests.graphs.fake import FakeCapture


@pytest.fixture
def captures_on_the_cpu(monkeypatch):
    """Let the CPU take the GPU's place, through the seam that captures go through."""
    monkeypatch.setitem(CAPTURES, "cpu", FakeCapture)
    FakeCapture.made = FakeCapture.alive = 0
    return FakeCapture
