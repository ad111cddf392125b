"""Weights that come and go, workspaces and graphs, on recordings small enough to reckon by hand."""

from __future__ import annotations

import dataclasses

import pytest

from diffusers_turbo.planning.options import GroupOffload, ModelOffload, PartialOffload, SequentialOffload
from diffusers_turbo.planning.units import MIB
from diffusers_turbo.prediction.allocator import Allocator
from diffusers_turbo.prediction.recording import Convolved, Entered, Gone, Left, Made, Multiplied, Recording
from diffusers_turbo.prediction.replay import Replay
from diffusers_turbo.prediction.residency import Weights, residency_of
from diffusers_turbo.prediction.workspaces import workspaces_of

SIZES = {"text": 40, "unet.a": 20, "unet.b": 30, "unet.c": 50, "vae.decoder": 60}
WEIGHTS = Weights(
    sizes={name: (size * MIB,) for name, size in SIZES.items()},
    order=("text", "unet", "vae"),
    sequence=("text", "unet", "vae"),
    blocks={"text": (), "unet": (("unet.a", "unet.b"),), "vae": ()},
)
NONE = dataclasses.replace(
    workspaces_of((9, 0)), cublas_bytes=0, other_bytes=0, nchw_copies=(0.0, 0.0), nhwc_copies=(0.0, 0.0)
)


def _forward(root, *leaves):
    inside = [event for leaf in leaves for event in (Entered(leaf), Left(leaf))]
    return (Entered(root), *inside, Left(root))


def _held(offload, *recordings, **how):
    """MiB of weights at the peak of each recording."""
    memory = Allocator()
    residency = residency_of(offload, WEIGHTS, memory, **how)
    replay = Replay(memory, NONE, residency)
    residency.begin()
    found = []
    for events in recordings:
        replay.begin_stage()
        replay.run(Recording(events=events))
        found.append(replay.peak.weights // MIB)
    return found


UNET = _forward("unet", "unet.a", "unet.b", "unet.c")
CALL = (_forward("text", "text"), UNET, UNET, _forward("vae", "vae.decoder"))


@pytest.mark.parametrize(
    ("offload", "held"),
    [
        (None, [200, 200, 200, 200]),
        # until the VAE is called the UNet is still there
        (ModelOffload(), [40, 100, 100, 100]),
        (SequentialOffload(), [40, 50, 50, 60]),
        (GroupOffload(offload_type="leaf_level"), [40, 50, 50, 60]),
        # while one layer works the next one comes: 30 + 50
        (GroupOffload(offload_type="leaf_level", use_stream=True), [40, 80, 80, 60]),
        # what is in no block stays for the whole forward: 50, and a block of 20 or 30
        (GroupOffload(num_blocks_per_group=1), [40, 80, 80, 60]),
        (GroupOffload(num_blocks_per_group=2), [40, 100, 100, 60]),
        (GroupOffload(offload_type="leaf_level", exclude_modules="vae"), [100, 110, 110, 60]),
    ],
    ids=repr,
)
def test_weights_on_the_device_under_each_offload(offload, held):
    assert _held(offload, *CALL) == held


@pytest.mark.parametrize(
    ("offload", "held"),
    [
        # nothing stays: a window of two groups, a with b and c; until the VAE is called it is still there
        (PartialOffload(), [40, 100, 100, 100]),
        # a and b stay, c passes
        (PartialOffload(resident_bytes=70 * MIB), [90, 100, 100, 110]),
        (PartialOffload(resident_bytes=10**9), [140, 140, 100, 160]),
        (PartialOffload(resident_bytes=10**9, denoiser_leaves=True), [40, 100, 100, 100]),
    ],
    ids=repr,
)
def test_weights_on_the_device_under_partial_offload(offload, held):
    assert _held(offload, *CALL, looped=("unet",)) == held


def test_a_component_outside_of_the_sequence_stays_until_the_call_ends():
    assert _held(ModelOffload(), CALL[0], CALL[3], UNET) == [40, 100, 160]  # the VAE encodes a picture first


def test_a_vae_moved_as_a_whole_stays():
    held = _held(GroupOffload(offload_type="leaf_level"), CALL[3], UNET, vae_as_a_whole=True)
    assert held == [60, 110]


def test_casting_weights_one_by_one():
    memory = Allocator()
    residency = residency_of(None, WEIGHTS, memory)
    residency.begin()
    for keep, wide, after in ((False, 260, 200), (True, 320, 320)):
        residency.widen("vae", keep=keep)
        assert memory.requested["weights"] == wide * MIB
        if not keep:
            residency.narrow("vae")
        assert memory.requested["weights"] == after * MIB
    assert WEIGHTS.widened("vae").sizes["vae.decoder"] == (120 * MIB,)


def test_workspaces_are_taken_where_they_are_needed():
    given = workspaces_of((9, 0))
    memory = Allocator()
    replay = Replay(memory, given, residency_of(None, WEIGHTS, memory))
    call = Convolved(input=30 * MIB, output=20 * MIB, weight=2 * MIB, channels_last=False, copies_input=False)
    replay.run(Recording(events=(call,)))
    assert (replay.peak.workspace, memory.allocated) == (52 * MIB, 0)
    last = dataclasses.replace(call, channels_last=True, copies_input=True)
    assert given.convolution_bytes(last) == 30 * MIB  # the copy of the input
    replay.begin_stage()
    for _ in range(2):  # cuBLAS keeps one workspace
        replay.run(Recording(events=(Multiplied(),)))
    assert memory.requested["workspace"] == given.cublas_bytes + given.other_bytes


def test_a_capture_empties_the_cache_and_keeps_a_pool():
    memory = Allocator()
    replay = Replay(memory, NONE, residency_of(None, WEIGHTS, memory))
    events = (Made(0, 30 * MIB), Made(1, 12 * MIB), Gone(0))
    recording = Recording(events=events, kept=(1,), inputs=((14 * MIB,),))
    replay.release(replay.run(recording))
    assert (memory.allocated, memory.reserved) == (0, 42 * MIB)
    replay.capture(recording)
    # inputs and outputs stay, and the pool with them; what the eager run had cached is gone
    assert (memory.allocated, memory.reserved) == (26 * MIB, (14 + 42) * MIB)
    assert replay.peak.graphs == 56 * MIB
    replay.capture(recording)
    assert memory.reserved == 2 * (14 + 42) * MIB
