"""What the allocator keeps goes back where it may be in the way of a decode, and only there."""

from __future__ import annotations

import pytest
import torch

from diffusers_turbo import turbo
from diffusers_turbo.actions import cached_memory, partial_offload
from diffusers_turbo.actions.cached_memory import is_in_the_way, may_be_in_the_way, return_cached_if_tight
from diffusers_turbo.actions.streaming import Loan
from tests import tiny

MIB = 2**20
CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("allocated", "reserved", "peak", "usable", "expected"),
    [
        # SD1.5 at 1024 pixels on a card of 3 GB: when the denoiser comes a second time, and at its first decode
        (20, 2312, 2259, 2545, True),
        (20, 1776, 2259, 2545, True),
        # on one of 80 GB
        (20, 4594, 2259, 80_000, False),
        # all of it is taken
        (2500, 2500, 2500, 2545, False),
        # somebody has reset the peak
        (20, 2312, 20, 2545, True),
        # what is cached could all be lost, and the peak would still fit
        (20, 300, 2250, 2545, False),
    ],
)
def test_it_may_be_in_the_way_where_the_peak_does_not_fit_beside_it(allocated, reserved, peak, usable, expected):
    found = may_be_in_the_way(allocated * MIB, reserved * MIB, peak * MIB, usable * MIB)
    assert found is expected


@pytest.fixture
def card(monkeypatch):
    """A stand-in for a GPU and its allocator: change what it tells; it notes what is asked to be returned."""
    told = {"allocated": 20, "reserved": 2312, "peak": 2259, "free": 50_000, "fraction": 2545 / 80_000, "returned": 0}

    def stats(device):
        allocated = {"current": told["allocated"], "peak": told["peak"]}
        return {"allocated_bytes": {"all": allocated}, "reserved_bytes": {"all": {"current": told["reserved"]}}}

    def returned(device):
        told["returned"] += 1

    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", stats)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda index: told["reserved"])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (told["free"], 80_000))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda index: told["fraction"], raising=False)
    monkeypatch.setattr(cached_memory, "is_recording", lambda device: told.get("recording", False))
    monkeypatch.setattr(cached_memory, "return_cached", returned)
    return told


@pytest.mark.parametrize(
    ("change", "returned"),
    [
        ({}, 1),
        ({"fraction": 1.0}, 0),
        # no cap, and another program holds the rest of the card
        ({"fraction": 1.0, "free": 200}, 1),
        # what is recorded must not meet an allocator that gives memory back
        ({"recording": True}, 0),
    ],
    ids=["capped", "roomy", "full", "recording"],
)
def test_by_what_the_allocator_and_the_device_tell(change, returned, card):
    card |= change
    return_cached_if_tight(CUDA)
    assert card["returned"] == returned


def test_off_cuda_and_before_its_allocator_has_begun_nothing_is_asked(card, monkeypatch):
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", lambda device: {})
    assert not is_in_the_way(CUDA)
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", None)
    assert not is_in_the_way(torch.device("cpu"))


@pytest.fixture
def happened(monkeypatch):
    """What happens in a call, in order: what is cached is looked at, or returned in any case; weights come."""
    events: list[str] = []
    bring = Loan.bring

    def noted(self, tensors, *, faithful):
        events.append("come")
        bring(self, tensors, faithful=faithful)

    monkeypatch.setattr(Loan, "bring", noted)
    monkeypatch.setattr(partial_offload, "return_cached_if_tight", lambda device: events.append("looked"))
    monkeypatch.setattr(partial_offload, "return_cached", lambda device: events.append("returned"))
    return events


@pytest.mark.parametrize(
    ("leaves", "calls"),
    [
        # text encoder, denoiser, decoder; then the same again
        (True, [["come", "looked", "come", "come"]] * 2),
        # a denoiser that stays needs to come once; a call's own tensors come at each
        (False, [["come", "looked", "come", "come"], ["come", "looked", "come"]]),
    ],
    ids=["leaves", "stays"],
)
def test_once_a_call_before_the_denoiser_works(leaves, calls, happened):
    pipe = turbo(tiny.sd())
    pipe.enable_partial_offload(None, denoiser_leaves=leaves, device="cpu:0")
    for expected in calls:
        happened.clear()
        tiny.picture(pipe, steps=4)
        assert happened == expected


def test_where_the_denoiser_is_streamed_it_goes_back_in_any_case(happened):
    pipe = turbo(tiny.sd())
    pipe.enable_partial_offload(700_000, denoiser_leaves=True, device="cpu:0")
    tiny.picture(pipe, steps=4)
    happened.clear()
    tiny.picture(pipe, steps=4)
    assert happened == ["come", "returned", "come", "come"]
