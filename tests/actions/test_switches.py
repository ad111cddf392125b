"""Each switch alone: it has its effect, keeps the picture as promised, and comes off without a trace."""

from __future__ import annotations

import pytest
import torch

from diffusers_turbo import turbo
from diffusers_turbo.parity import distance
from tests import tiny
from tests.actions.switches import SWITCHES, Switch
from tests.state import differences, state_of


@pytest.mark.parametrize("switch", SWITCHES, ids=str)
@pytest.mark.parametrize("make", [tiny.sd, tiny.sdxl], ids=["sd", "sdxl"])
def test_effect_picture_and_undo(make, switch: Switch):
    pipe = turbo(make())
    stock, before = tiny.picture(pipe), state_of(pipe)
    assert differences(before, state_of(pipe)) == []
    switch.throw(pipe)
    assert switch.effect(pipe)
    ours = tiny.picture(pipe)
    assert switch.effect(pipe), "a call took the switch off"
    apart = distance(ours, stock)
    assert apart.broken == 0
    assert apart.psnr_db >= (90 if switch.exact else 15)
    switch.release(pipe)
    assert differences(before, state_of(pipe)) == []
    assert torch.equal(tiny.picture(pipe), stock)


@pytest.mark.parametrize("switch", SWITCHES, ids=str)
def test_twice_is_once_and_turbo_undo_ends_it(switch: Switch):
    pipe = turbo(tiny.sd())
    before = state_of(pipe)
    switch.throw(pipe)
    levers = pipe.turbo_report().levers
    switch.throw(pipe)
    assert pipe.turbo_report().levers == levers
    assert pipe.turbo_undo().left_alone == ()
    assert differences(before, state_of(pipe)) == []


@pytest.mark.parametrize("switch", SWITCHES, ids=str)
def test_off_when_never_on_does_nothing(switch: Switch, caplog):
    pipe = turbo(tiny.sd())
    before = state_of(pipe)
    with caplog.at_level("INFO", logger="diffusers_turbo"):
        switch.release(pipe)
    assert "nothing to switch off" in caplog.text
    assert differences(before, state_of(pipe)) == []


@pytest.mark.parametrize("switch", SWITCHES, ids=str)
def test_a_failing_action_changes_nothing(switch: Switch, monkeypatch):
    """Whatever the action last does fails: everything before it is rolled back, and the error says what was tried."""
    from diffusers_turbo import TurboError
    from diffusers_turbo.actions import undo

    pipe = turbo(tiny.sd())
    before = state_of(pipe)
    if switch.slot == "tf32":
        pytest.skip("tf32 changes nothing until a call")

    def broken_note(self, sentence):
        raise RuntimeError("the disk is on fire")

    with monkeypatch.context() as patch:
        patch.setattr(undo.Journal, "note", broken_note)
        if switch.slot == "vae_slicing":
            patch.setattr(type(pipe.vae), "enable_slicing", lambda vae: broken_note(vae, ""))
        with pytest.raises(TurboError, match="the disk is on fire.*everything it had changed is undone"):
            switch.throw(pipe)
    assert differences(before, state_of(pipe)) == []
    switch.throw(pipe)
    assert switch.effect(pipe)
