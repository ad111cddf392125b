"""auto_optimize: the plan is applied as it stands, wholly or not at all, and comes off without a trace."""

from __future__ import annotations

import pytest
import torch

from diffusers_turbo import DeviceFacts, TurboError, auto_optimize, entry, plan, turbo
from diffusers_turbo.actions.apply import apply_plan
from diffusers_turbo.actions.ledger import ledger_of, open_ledger
from diffusers_turbo.planning.plan import Plan, Step
from tests import tiny
from tests.state import differences, state_of


@pytest.mark.parametrize("make", [tiny.sd, tiny.sdxl, tiny.pixart], ids=["sd", "sdxl", "pixart"])
def test_applied_as_planned_and_undone(make):
    pipe = make()
    stock, before = tiny.picture(pipe), state_of(pipe)
    assert auto_optimize(pipe) is pipe
    report = pipe.turbo_report()
    assert [lever.action for lever in report.levers] == [step.action for step in report.plan.steps]
    assert report.exact
    torch.testing.assert_close(tiny.picture(pipe), stock, atol=1e-5, rtol=0)
    pipe.turbo_undo()
    assert differences(before, state_of(pipe)) == []
    assert torch.equal(tiny.picture(pipe), stock)


def test_twice_is_once():
    pipe = auto_optimize(tiny.sd())
    levers = pipe.turbo_report().levers
    assert auto_optimize(pipe).turbo_report().levers == levers


def test_a_step_that_fails_takes_the_others_back():
    pipe = turbo(tiny.sd())
    pipe.enable_naive_attention()
    before = state_of(pipe)
    steps = (
        Step(action="enable_sdpa", options={}, reason="", exact=True),
        Step(action="enable_channels_last", options={}, reason="", exact=True),
        Step(action="enable_sequential_cpu_offload", options={"device": "cpu"}, reason="", exact=True),
    )
    good = plan(pipe, DeviceFacts.card("CPU"))
    broken = Plan(**{**vars(good), "steps": steps})
    with pytest.raises(TurboError, match="the weights wait already"):
        apply_plan(pipe, broken)
    assert [lever.action for lever in pipe.turbo_report().levers] == ["enable_naive_attention"]
    after = state_of(pipe)
    # processors hold nothing but options: the lever below was applied anew with equal ones
    assert [change for change in differences(before, after) if "processor" not in change] == []


class TestAPipelineInHostMemory:
    """On a machine with an accelerator (which `meta` plays here: components that move there show it)."""

    @pytest.fixture(autouse=True)
    def card(self, monkeypatch):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("meta"))
        monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
        monkeypatch.setattr(entry, "probe", lambda device: self.asked.append(device) or DeviceFacts.card("RTX 3060"))
        self.asked = []

    def test_moves_there_and_says_so(self, monkeypatch):
        moved = []
        pipe = tiny.sd()
        monkeypatch.setattr(type(pipe), "to", lambda self, device: moved.append(device))
        auto_optimize(pipe, tier="none")
        assert self.asked == moved == [torch.device("meta")]
        assert "moved from cpu to meta" in str(pipe.turbo_report())
        assert ledger_of(pipe).came_from == dict.fromkeys(("vae", "text_encoder", "unet"), torch.device("cpu"))
        pipe.turbo_undo()
        assert ledger_of(pipe) is None

    def test_a_move_that_fails_in_the_middle_is_taken_back(self, monkeypatch):
        pipe = turbo(tiny.sd())
        before = state_of(pipe)

        def give_up(self, device):
            self.unet.double()  # stands for a component that has moved already
            ledger_of(self).came_from["unet"] = torch.float32
            raise torch.OutOfMemoryError("no room for the next")

        monkeypatch.setattr(type(pipe), "to", give_up)
        with pytest.raises(torch.OutOfMemoryError, match="no room for the next"):
            auto_optimize(pipe, tier="none")
        assert differences(before, state_of(pipe)) == []
        assert ledger_of(pipe) is None

    def test_moves_back(self):
        pipe = turbo(tiny.sd())
        stock = tiny.picture(pipe)
        open_ledger(pipe).bring(pipe, torch.device("cpu"))
        pipe.unet.double()  # stands for a place: what `.to` does to a component is taken back component by component
        ledger_of(pipe).came_from["unet"] = torch.float32
        pipe.turbo_undo()
        assert pipe.unet.dtype == torch.float32
        assert torch.equal(tiny.picture(pipe), stock)

    def test_stays_where_it_is_asked_to(self):
        pipe = auto_optimize(tiny.sd(), device="cpu")
        assert self.asked == [torch.device("cpu")]
        assert "moved" not in str(pipe.turbo_report())

    def test_names_of_one_device(self):
        """`cuda` is the current one, here the first."""
        same = entry._same_device
        names = ("cuda", "cuda:0", "cuda:1", "cpu")
        found = [same(torch.device("cuda"), torch.device(name)) for name in names]
        assert found == [True, True, False, False]
        assert not same(torch.device("cuda:0"), torch.device("cuda:1"))

    def test_stays_where_it_is_if_it_lies_elsewhere(self):
        there = torch.device("cpu")
        assert entry._place_to_run(tiny.sd().to("meta"), there) == there


def test_users_levers_stay_below_the_plan():
    pipe = turbo(tiny.sd())
    before = state_of(pipe)
    pipe.enable_vae_slicing()
    auto_optimize(pipe)
    assert "enable_vae_slicing" in [lever.action for lever in pipe.turbo_report().levers]
    pipe.turbo_undo()
    assert differences(before, state_of(pipe)) == []


@pytest.mark.parametrize("card", ["GTX 1650", "T4", "RTX 3060", "RTX 4090", "H100"])
def test_plans_for_cards_that_are_not_there_are_made_of_methods(card):
    pipe = turbo(tiny.sdxl())
    made = plan(pipe, DeviceFacts.card(card), height=1024, width=1024, batch_size=2, dtype="auto", images=1000)
    for step in (*made.steps, *made.rejected):
        assert callable(getattr(pipe, step.action))
        assert step.reason
