from __future__ import annotations

import itertools

import pytest

from diffusers_turbo.planning.conflicts import CONFLICTS, SLOT_ORDER, conflicts_between, conflicts_with, in_order
from diffusers_turbo.planning.options import (
    ACTIONS,
    ChannelsLast,
    CompileUNet,
    CompileVAE,
    GroupOffload,
    HalfPrecision,
    LoadExportedUNet,
    ModelOffload,
    SDPAAttention,
    SequentialOffload,
    TraceUNet,
    VAETiling,
    make_options,
)

EVERY = [make_options(action) for action in ACTIONS]


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(EVERY, 2)))
def test_conflicts_do_not_depend_on_the_order(one, other):
    assert conflicts_between(one, other) == conflicts_between(other, one)


def test_one_attention_and_one_offload_at_a_time():
    for slot in ("attention", "offload"):
        members = [options for options in EVERY if options.slot == slot]
        for one, other in itertools.combinations(members, 2):
            assert conflicts_between(one, other)


def test_compiles_of_different_components_go_together():
    assert conflicts_between(CompileUNet(), CompileVAE()) == []


@pytest.mark.parametrize(
    ("one", "other", "text"),
    [
        (CompileUNet(), SequentialOffload(), "replaces every layer's forward"),
        (CompileUNet(), GroupOffload(), "breaks the graph at every group"),
        (CompileUNet(fullgraph=True), ModelOffload(), "fullgraph"),
        (CompileUNet(), TraceUNet(), "both replace"),
        (TraceUNet(), GroupOffload(), "holds the weights"),
        (LoadExportedUNet(), CompileUNet(), "stand in for"),
        (LoadExportedUNet(), ModelOffload(), "reads them where they were"),
        (CompileVAE(), VAETiling(), "outside compiled code"),
    ],
)
def test_known_conflicts_carry_their_reason(one, other, text):
    (reason,) = conflicts_between(one, other)
    assert text in reason
    assert conflicts_with(one, [SDPAAttention(), other]) == [f"{other.action}: {reason}"]


def test_a_partial_graph_goes_with_model_offload():
    assert conflicts_between(CompileUNet(), ModelOffload()) == []


def test_every_conflict_can_occur_and_every_slot_has_a_reason():
    for conflict in CONFLICTS:
        assert conflict.reason
    assert {options.slot for options in EVERY} == set(SLOT_ORDER)


def test_the_order_is_that_of_the_slots():
    shuffled = [CompileUNet(), SequentialOffload(), ChannelsLast(), HalfPrecision(), SDPAAttention()]
    assert [options.slot for options in in_order(shuffled)] == [
        "precision",
        "layout",
        "attention",
        "offload",
        "compile",
    ]
    assert [options.slot for options in in_order(EVERY)] == [options.slot for options in EVERY]
