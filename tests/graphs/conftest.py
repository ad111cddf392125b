from __future__ import annotations

import pytest
import torch

from diffusers_turbo.actions.streaming import Loan
from diffusers_turbo.graphs.capture import CAPTURES
from tests.graphs.fake import FakeCapture


@pytest.fixture(autouse=True)
def captures_on_the_cpu(monkeypatch):
    """Let the CPU take the GPU's place, through the seam that captures go through."""
    monkeypatch.setitem(CAPTURES, "cpu", FakeCapture)
    FakeCapture.made = FakeCapture.alive = 0
    return FakeCapture


@pytest.fixture
def what_left_is_not_a_number(monkeypatch):
    """Weights that went home leave NaN where they were: a graph that still reads there shows it."""
    end = Loan.end

    def spoilt(self):
        copies = [(tensor, tensor.data) for tensor in self._away]
        end(self)
        for tensor, held in copies:
            if held.data_ptr() != tensor.data_ptr() and held.is_floating_point():
                held.fill_(torch.nan)

    monkeypatch.setattr(Loan, "end", spoilt)
