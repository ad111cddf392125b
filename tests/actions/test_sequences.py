"""Any sequence of switches, with calls in between: each has its effect, and undo leaves nothing behind."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffusers_turbo import TurboError, turbo
from tests import tiny
from tests.actions.switches import SWITCHES, Switch
from tests.state import differences, state_of

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("on"), st.sampled_from([s for s in SWITCHES if s.slot != "trace"])),
        st.tuples(st.just("off"), st.sampled_from([s for s in SWITCHES if s.slot != "trace"])),
        st.just(("call", None)),
    ),
    min_size=2,
    max_size=7,
)


@settings(max_examples=25, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=STEPS)
def test_random_sequences(steps):
    pipe = turbo(tiny.sd())
    stock, before = tiny.picture(pipe, steps=1), state_of(pipe)
    # What should be on: one stack a slot, as the ledger promises.
    stacks: dict[str, list[Switch]] = {}
    for kind, switch in steps:
        if kind == "call":
            assert torch.isfinite(tiny.picture(pipe, steps=1)).all()
        elif kind == "on":
            switch.throw(pipe)
            others = [s for s in stacks.get(switch.slot, []) if s.on != switch.on]
            stacks[switch.slot] = [*others, switch]
        else:
            switch.release(pipe)
            gone = [s for stack in stacks.values() for s in stack if s.off == switch.off]
            for slot in list(stacks):
                stacks[slot] = [s for s in stacks[slot] if s not in gone]
        for stack in stacks.values():
            if stack:
                assert stack[-1].effect(pipe), f"{stack[-1]} is not in force"
    assert pipe.turbo_undo().left_alone == ()
    assert differences(before, state_of(pipe)) == []
    assert torch.equal(tiny.picture(pipe, steps=1), stock)


def by_name(name: str) -> Switch:
    return next(switch for switch in SWITCHES if str(switch) == name)


def test_removing_from_the_middle_of_a_stack():
    pipe = turbo(tiny.sd())
    before = state_of(pipe)
    for name in ("enable_naive_attention", "enable_sdpa-math", "enable_attention_slicing"):
        by_name(name).throw(pipe)
    pipe.disable_sdpa()
    assert by_name("enable_attention_slicing").effect(pipe)
    pipe.disable_attention_slicing()
    assert by_name("enable_naive_attention").effect(pipe)
    pipe.disable_naive_attention()
    assert differences(before, state_of(pipe)) == []


@pytest.mark.parametrize("first", ["precision", "layout", "offload"])
def test_weights_change_under_offload_and_come_back(first):
    """Precision and layout change with the weights off their hooks; the order of the calls makes no difference."""
    pipe = turbo(tiny.sd())
    tiny.picture(pipe, steps=1)  # a first call sets the pipeline's own attributes
    before = state_of(pipe)
    order = {"precision": "poc", "layout": "cop", "offload": "opc"}[first]
    actions = {
        "p": lambda: pipe.enable_half_precision(torch.bfloat16),
        "o": lambda: pipe.enable_group_offload("cpu", offload_type="leaf_level"),
        "c": lambda: pipe.enable_channels_last(),
    }
    for letter in order:
        actions[letter]()
    tiny.picture(pipe, steps=1)
    assert pipe.unet.conv_in.weight.dtype == torch.bfloat16
    pipe.disable_half_precision()
    assert by_name("enable_group_offload-leaf").effect(pipe)
    pipe.turbo_undo()
    assert differences(before, state_of(pipe)) == []


def test_a_trace_is_made_anew_when_what_it_baked_in_changes():
    pipe = turbo(tiny.sd())
    before = state_of(pipe)
    pipe.trace_unet()
    first = pipe.unet.forward
    pipe.enable_naive_attention()
    assert pipe.unet.forward is not first
    pipe.disable_naive_attention()
    pipe.untrace_unet()
    assert differences(before, state_of(pipe)) == []


def test_offload_under_a_trace_is_refused_and_nothing_changes():
    pipe = turbo(tiny.sd())
    pipe.trace_unet()
    stock = tiny.picture(pipe)
    with pytest.raises(TurboError, match="trace_unet.*hooked already"):
        pipe.enable_model_cpu_offload(device="cpu")
    assert "forward" in vars(pipe.unet)
    assert [lever.action for lever in pipe.turbo_report().levers] == ["trace_unet"]
    assert torch.equal(tiny.picture(pipe), stock)


@pytest.mark.parametrize("end", ["disable_half_precision", "turbo_undo"])
def test_projections_fused_in_half_precision_get_their_precision_back(end):
    """They are copies made meanwhile, which half precision has no original of."""
    pipe = turbo(tiny.sd())
    pipe.fuse_qkv_projections()
    fused = tiny.picture(pipe, steps=1)
    pipe.turbo_undo()
    before = state_of(pipe)
    pipe.enable_half_precision("bfloat16")
    pipe.fuse_qkv_projections()
    if end == "disable_half_precision":
        pipe.disable_half_precision()
        assert torch.equal(tiny.picture(pipe, steps=1), fused)
    assert pipe.turbo_undo().left_alone == ()
    assert differences(before, state_of(pipe)) == []
