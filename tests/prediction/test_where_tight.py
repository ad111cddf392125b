"""A plan waits for a prediction only where memory is tight, and not hopelessly so."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from diffusers_turbo import DeviceFacts
from diffusers_turbo.bench.architectures import build
from diffusers_turbo.facts.pipeline import read_pipeline
from diffusers_turbo.planning.memory import estimate_memory
from diffusers_turbo.prediction.where_tight import PLENTY, PredictWhereTight
from tests import tiny

H100 = DeviceFacts.card("H100")


@pytest.mark.parametrize(
    ("room", "predicted"),
    [(2.01, False), (1.99, True), (1, True), (0.51, True), (0.49, False), (None, True)],
)
@pytest.mark.parametrize("free", [True, False], ids=["free memory", "a budget"])
def test_a_prediction_is_made_where_memory_is_tight_or_not_known(room, free, predicted):
    pipe = tiny.sd()
    facts = read_pipeline(pipe)
    closed_form = estimate_memory(facts, 64, 64)
    assert max(stage.weights_bytes for stage in closed_form.stages) < 0.4 * closed_form.needed_bytes
    bytes_ = None if room is None else int(room * closed_form.needed_bytes)
    device = dataclasses.replace(H100, free_bytes=bytes_ if free else None)
    estimates = PredictWhereTight(pipe, device, None if free else bytes_)
    assert (estimates(facts, 64, 64) != closed_form) == predicted


def test_no_prediction_is_made_where_the_weights_alone_have_no_room():
    pipe = build("sd15", dtype=torch.float16, device="meta")
    facts = read_pipeline(pipe)
    closed_form = estimate_memory(facts, 512, 512)
    assert closed_form.needed_bytes < PLENTY * facts.parameter_bytes
    for room, predicted in ((facts.parameter_bytes - 1, False), (facts.parameter_bytes, True)):
        found = PredictWhereTight(pipe, H100, room)(facts, 512, 512)
        assert (found != closed_form) == predicted
