"""A plan waits for a prediction only where memory is tight."""

from __future__ import annotations

import dataclasses

import pytest

from diffusers_turbo import DeviceFacts
from diffusers_turbo.facts.pipeline import read_pipeline
from diffusers_turbo.planning.memory import estimate_memory
from diffusers_turbo.prediction.where_tight import PLENTY, PredictWhereTight
from tests import tiny

H100 = DeviceFacts.card("H100")


@pytest.mark.parametrize(
    ("free", "budget", "predicted"),
    [
        (80 * 2**30, None, False),
        (80 * 2**30, "80GB", False),
        (80 * 2**30, "10MB", True),
        (2**20, None, True),
        (None, None, True),
    ],
)
def test_a_prediction_is_made_where_memory_is_tight_or_not_known(free, budget, predicted):
    pipe = tiny.sd()
    facts = read_pipeline(pipe)
    estimates = PredictWhereTight(pipe, dataclasses.replace(H100, free_bytes=free), budget)
    found, closed_form = estimates(facts, 64, 64), estimate_memory(facts, 64, 64)
    assert (found != closed_form) == predicted
    if not predicted:
        assert closed_form.needed_bytes * PLENTY <= estimates.room_bytes
