"""Graphs of a denoiser that is streamed: its copies are recorded with the step."""

from __future__ import annotations

import copy
from contextlib import ExitStack

import pytest
import torch

from diffusers_turbo import turbo
from diffusers_turbo.actions import page_locked, partial_offload, streaming
from diffusers_turbo.actions.ledger import ledger_of
from diffusers_turbo.actions.partial_offload import PartialResidency
from diffusers_turbo.actions.streaming import Window
from diffusers_turbo.errors import NotSupportedError
from diffusers_turbo.graphs.capture import CAPTURES
from tests import tiny
from tests.controlled import controlled
from tests.graphs.fake import FakeCapture
from tests.graphs.offloaded import DEVICE, recorded
from tests.state import differences, state_of

pytestmark = pytest.mark.usefixtures("what_left_is_not_a_number")


@pytest.fixture
def recording(monkeypatch):
    """Have the offload told when the stand-in records, as CUDA tells it."""
    state = []

    class Told(FakeCapture):
        def __init__(self, run, device):
            state.append(True)
            try:
                super().__init__(run, device)
            finally:
                state.pop()

    monkeypatch.setitem(CAPTURES, "cpu", Told)
    for user in (partial_offload, streaming):
        monkeypatch.setattr(user, "is_recording", lambda device: bool(state))
    return state


@pytest.mark.parametrize("resident_bytes", [0, 300_000, 700_000])
@pytest.mark.parametrize("leaves", [False, True])
def test_a_denoiser_that_is_streamed_is_recorded_with_its_copies(resident_bytes, leaves, recording):
    pipe, plain = turbo(tiny.sd()), tiny.sd()
    tiny.picture(pipe, steps=4)
    before, weights = state_of(pipe), copy.deepcopy(pipe.unet.state_dict())
    pipe.enable_partial_offload(resident_bytes, denoiser_leaves=leaves, device=DEVICE)
    pipe.enable_cuda_graphs()
    graphs = recorded(pipe)

    def change(pipe, step, timestep, tensors):
        with torch.no_grad():
            pipe.unet.mid_block.resnets[0].conv1.weight.mul_(1 + step / 10)
            pipe.unet.conv_in.weight.mul_(1 + step / 10)
        return {}

    for _ in range(4):
        assert torch.equal(tiny.picture(pipe, steps=6), tiny.picture(plain, steps=6))
    assert graphs.reason is None
    # the first step learns, the second sees, the third is recorded; other calls record at once
    assert (graphs.eager, graphs.captured, graphs.replayed) == (2, 4, 22)
    assert FakeCapture.alive == 0  # gone with the window
    ours, stock = (tiny.picture(each, steps=4, callback_on_step_end=change) for each in (pipe, plain))
    assert torch.equal(ours, stock)
    pipe.unet.load_state_dict(weights)
    pipe.turbo_undo()
    assert differences(before, state_of(pipe)) == []


def test_a_controlnet_that_joins_late_is_not_learnt_inside_a_recording(recording, monkeypatch):
    """Which begins anew to learn the order of the layers, in the middle of a call that has graphs already."""
    enter, astray = PartialResidency.enter, []

    def watched(self, unit):
        if recording and self.layers.groups is None:
            astray.append(unit)
        enter(self, unit)

    monkeypatch.setattr(PartialResidency, "enter", watched)
    pipe = turbo(controlled())
    latents = (torch.ones(1, 4, 8, 8), 3, torch.ones(1, tiny.TOKENS, tiny.CONTEXT))
    hint = {"controlnet_cond": torch.ones(1, 3, 64, 64), "return_dict": False}
    with torch.no_grad(), ExitStack() as stack:
        stock = pipe.unet(*latents).sample, pipe.controlnet(*latents, **hint)[1]
        pipe.enable_partial_offload(100_000, device=DEVICE)
        pipe.enable_cuda_graphs()
        for lever in ledger_of(pipe).in_force():
            for scope in lever.journal.scopes:
                stack.enter_context(scope.around_call(pipe))
        for step in range(8):
            if step >= 3:
                assert torch.equal(pipe.controlnet(*latents, **hint)[1], stock[1])
            assert torch.equal(pipe.unet(*latents).sample, stock[0])
    assert astray == []
    assert recorded(pipe).captured == 2  # by itself, and beside the ControlNet


def test_a_recording_that_fails_half_way_leaves_nothing_in_the_window(recording, monkeypatch):
    """As where a graph finds no memory of its own under a tight cap."""
    enter, entered = Window.enter, []

    def failing(self, group):
        if recording:
            entered.append(group)
            if len(entered) % 3 == 0:
                raise torch.OutOfMemoryError("CUDA out of memory")
        enter(self, group)

    settle, settled = Window.settle, []

    def seen(self):
        settled.append(bool(recording))
        settle(self)

    monkeypatch.setattr(Window, "enter", failing)
    monkeypatch.setattr(Window, "settle", seen)
    pipe = turbo(tiny.sd())
    pipe.enable_partial_offload(300_000, device=DEVICE)
    pipe.enable_cuda_graphs()
    for _ in range(2):
        assert torch.equal(tiny.picture(pipe, steps=4), tiny.picture(tiny.sd(), steps=4))
    assert (recorded(pipe).captured, recorded(pipe).eager) == (0, 8)
    assert settled.count(True) == 2  # before either recording ended: its streams have come together
    assert "could not be captured" in str(pipe.turbo_report())


def test_a_denoiser_that_is_streamed_from_ordinary_memory_is_refused(monkeypatch):
    monkeypatch.setattr(page_locked, "can_pin", lambda device: True)
    pipe = turbo(tiny.sd())
    pipe.enable_partial_offload(100_000, pin_memory=False, device=DEVICE)
    with pytest.raises(NotSupportedError, match="carries offload hooks, which move weights in the middle of a call"):
        pipe.enable_cuda_graphs()
