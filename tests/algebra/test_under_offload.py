"""What is computed ahead beside offload: whoever came first, nothing of it is left behind."""

from __future__ import annotations

import pytest
import torch

from diffusers_turbo import turbo
from tests import tiny
from tests.state import differences, state_of

AHEAD = ("enable_prompt_projections", "enable_time_projections")


def leaves(pipe):
    pipe.enable_group_offload("cpu", offload_type="leaf_level")


def partly(pipe):
    pipe.enable_partial_offload(resident_bytes=0, device="cpu")


@pytest.mark.parametrize("first", ["ahead", "offload"])
@pytest.mark.parametrize("offload", [leaves, partly])
@pytest.mark.parametrize("action", AHEAD)
def test_nothing_is_left_behind(action, offload, first):
    pipe = turbo(tiny.sd())
    stock = tiny.picture(pipe)
    before = state_of(pipe)
    steps = [lambda: getattr(pipe, action)(), lambda: offload(pipe)]
    for step in steps if first == "ahead" else reversed(steps):
        step()
    tiny.picture(pipe)
    pipe.turbo_undo()
    assert differences(before, state_of(pipe)) == []
    assert torch.equal(tiny.picture(pipe), stock)
