"""A plan that breaks its promise loses the guilty step, by name, and keeps the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from diffusers_turbo import Plan, auto_optimize
from diffusers_turbo.actions.apply import APPLY, apply_plan
from diffusers_turbo.actions.undo import Journal
from diffusers_turbo.planning import options as opt
from diffusers_turbo.planning.plan import Step
from diffusers_turbo.verification import inputs as verification_inputs
from diffusers_turbo.verification.blame import settle
from diffusers_turbo.verification.check import Yardstick
from tests.state import differences, state_of
from tests.test_exactness import load

TWO = ["a flat emoji of rocket", "a 3d emoji of octopus"]

Fault = Callable[[Any, Journal], None]


def mid_block_skipped(pipe: Any, journal: Journal) -> None:
    journal.set_attribute(pipe.unet.mid_block, "forward", lambda hidden_states, *args, **kwargs: hidden_states)


def another_prompt(pipe: Any, journal: Journal) -> None:
    layer = next(module for name, module in pipe.unet.named_modules() if name.endswith("attn2"))
    original = layer.forward
    journal.set_attribute(
        layer,
        "forward",
        lambda hidden_states, encoder_hidden_states=None, **kwargs: original(
            hidden_states, encoder_hidden_states.roll(1, dims=0), **kwargs
        ),
    )


def overflow(pipe: Any, journal: Journal) -> None:
    """The decoder's values leave half precision's range, as SDXL's do."""
    decoder = pipe.vae.decoder
    original = decoder.forward
    journal.set_attribute(decoder, "forward", lambda *args, **kwargs: original(*args, **kwargs) * float("nan"))


@pytest.fixture
def plant(monkeypatch):
    """Make one action carry a fault, as a bug in it would."""

    def put(options: type[opt.Options], fault: Fault) -> None:
        sound = APPLY[options]

        def apply(pipe: Any, given: Any) -> Journal:
            journal = sound(pipe, given)
            fault(pipe, journal)
            return journal

        monkeypatch.setitem(APPLY, options, apply)

    return put


def step(action: str, **options: Any) -> Step:
    return Step(action=action, options=options, reason="a test", exact=True)


EXACT_PLAN = Plan(steps=(step("enable_channels_last"), step("enable_sdpa"), step("enable_vae_slicing")), rejected=())


@pytest.mark.parametrize(
    ("options", "action", "fault"),
    [
        (opt.ChannelsLast, "enable_channels_last", mid_block_skipped),
        (opt.SDPAAttention, "enable_sdpa", another_prompt),
        (opt.VAESlicing, "enable_vae_slicing", overflow),
    ],
)
def test_the_guilty_step_goes_and_the_others_stay(plant, options, action, fault):
    plant(options, fault)
    pipe = load(torch.float32, "cpu")
    yardstick = Yardstick(pipe, verification_inputs.make_inputs(TWO, steps=2, batch_size=2))
    apply_plan(pipe, EXACT_PLAN)
    settled = settle(pipe, EXACT_PLAN, yardstick)
    assert [guilty.step.action for guilty in settled.guilty] == [action]
    assert settled.verification.kept
    others = {item.action for item in EXACT_PLAN.steps} - {action}
    assert {item.action for item in settled.plan.steps} == others
    assert {lever.action for lever in pipe.turbo_report().levers} == others
    (rejected,) = settled.plan.rejected
    assert rejected.action == action
    assert "where exact was promised" in rejected.reason


def test_two_guilty_steps(plant):
    plant(opt.ChannelsLast, mid_block_skipped)
    plant(opt.VAESlicing, another_prompt)
    pipe = load(torch.float32, "cpu")
    yardstick = Yardstick(pipe, verification_inputs.make_inputs(TWO, steps=2, batch_size=2))
    apply_plan(pipe, EXACT_PLAN)
    settled = settle(pipe, EXACT_PLAN, yardstick)
    assert {guilty.step.action for guilty in settled.guilty} == {"enable_channels_last", "enable_vae_slicing"}
    assert [item.action for item in settled.plan.steps] == ["enable_sdpa"]


@pytest.fixture
def short(monkeypatch):
    """Two pairs of two steps, so that a check takes a second or two."""
    monkeypatch.setattr(
        "diffusers_turbo.entry.make_inputs",
        lambda **size: verification_inputs.make_inputs(TWO, steps=2, **(size | {"batch_size": 2})),
    )


def test_auto_optimize_verifies_a_sound_plan(short):
    pipe = load(torch.float32, "cpu")
    pipe("a cat", num_inference_steps=2)  # what a call sets on the pipeline is there before
    before = state_of(pipe)
    auto_optimize(pipe, dtype="bfloat16", verify=True)
    report = pipe.turbo_report()
    assert {lever.action for lever in report.levers} == {"enable_half_precision", "trace_unet"}
    assert report.verification.kept
    assert report.verification.stock is not None
    assert "Verified: StableDiffusionPipeline on cpu in bfloat16: exact" in str(report)
    assert "taken off" not in str(report)
    pipe.turbo_undo()
    assert differences(before, state_of(pipe)) == []


def test_auto_optimize_names_nan_in_half_precision(plant, short, caplog):
    plant(opt.HalfPrecision, overflow)
    pipe = load(torch.float32, "cpu")
    auto_optimize(pipe, dtype="bfloat16", verify=True)
    report = pipe.turbo_report()
    assert {lever.action for lever in report.levers} == {"trace_unet"}
    assert report.verification.kept
    rejected = {item.action: item.reason for item in report.plan.rejected}
    assert "2 of 2 pictures hold NaN" in rejected["enable_half_precision"]
    assert "enable_half_precision: taken off after verification" in caplog.text


def test_auto_optimize_names_a_trace_of_a_skipped_mid_block(monkeypatch, short):
    sound = APPLY[opt.TraceUNet]

    def apply(pipe: Any, given: Any) -> Journal:
        fault = Journal()
        mid_block_skipped(pipe, fault)
        try:
            return sound(pipe, replace(given, check=False))
        finally:
            fault.revert()

    monkeypatch.setitem(APPLY, opt.TraceUNet, apply)
    pipe = load(torch.float32, "cpu")
    auto_optimize(pipe, verify=True)
    report = pipe.turbo_report()
    assert report.levers == ()
    assert any(item.action == "trace_unet" and "taken off" in item.reason for item in report.plan.rejected)


def test_a_fault_from_before_the_plan_blames_no_step(monkeypatch):
    pipe = load(torch.float32, "cpu")
    yardstick = Yardstick(pipe, verification_inputs.make_inputs(TWO, steps=1, batch_size=2))
    mid_block_skipped(pipe, Journal())
    apply_plan(pipe, EXACT_PLAN)
    settled = settle(pipe, EXACT_PLAN, yardstick)
    assert settled.guilty == ()
    assert settled.plan.steps == ()
    assert all("without any step" in item.reason for item in settled.plan.rejected)
