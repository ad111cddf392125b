"""The rules of the caching allocator, on sequences whose outcome is known from its source."""

from __future__ import annotations

import itertools
import random

import pytest

from diffusers_turbo.planning.units import MIB
from diffusers_turbo.prediction.allocator import MIN_BLOCK, Allocator, rounded, segment_bytes


def _counted(memory):
    return memory.allocated, memory.reserved


@pytest.mark.parametrize(
    ("size", "allocated", "reserved"),
    [
        (1, 512, 2 * MIB),  # small requests share segments of 2 MiB
        (MIB, MIB, 2 * MIB),  # the largest small one
        (MIB + 1, MIB + 512, 20 * MIB),  # the smallest large one shares a segment of 20 MiB
        (10 * MIB - 1, 10 * MIB, 10 * MIB),  # rounded up to one that has a segment of its own
        (10 * MIB, 10 * MIB, 10 * MIB),
        (25 * MIB, 26 * MIB, 26 * MIB),  # a rest of 1 MiB is not split off and counts as allocated
        (25 * MIB - 512, 25 * MIB - 512, 26 * MIB),  # more than 1 MiB is
    ],
)
def test_one_request(size, allocated, reserved):
    memory = Allocator()
    memory.allocate(size)
    assert _counted(memory) == (allocated, reserved)


def test_a_freed_block_is_given_out_again_and_reserves_nothing():
    memory = Allocator()
    first = memory.allocate(30 * MIB)
    memory.free(first)
    assert _counted(memory) == (0, 30 * MIB)
    again = memory.allocate(30 * MIB)
    assert again.address == first.address
    assert _counted(memory) == (30 * MIB, 30 * MIB)


def test_the_smallest_block_that_fits_is_taken():
    memory = Allocator()
    blocks = [memory.allocate(size * MIB) for size in (40, 30, 50)]
    for block in blocks:
        memory.free(block)
    assert memory.allocate(29 * MIB).address == blocks[1].address
    # 1 MiB is left of it, too little to be split off
    assert memory.allocated == 30 * MIB


def test_neighbours_grow_together_when_freed():
    memory = Allocator()
    parts = [memory.allocate(5 * MIB) for _ in range(4)]
    assert _counted(memory) == (20 * MIB, 20 * MIB)
    for part in (parts[0], parts[2], parts[1]):
        memory.free(part)
    assert memory.allocate(15 * MIB).address == parts[0].address
    assert memory.reserved == 20 * MIB


def test_holes_are_not_joined_across_segments():
    memory = Allocator()
    blocks = [memory.allocate(12 * MIB) for _ in range(2)]
    for block in blocks:
        memory.free(block)
    memory.allocate(24 * MIB)
    assert memory.reserved == 48 * MIB


def test_pools_share_nothing():
    memory = Allocator()
    memory.free(memory.allocate(16 * MIB))
    memory.allocate(16 * MIB, pool=1)
    assert memory.reserved == 32 * MIB


def test_emptying_the_cache_returns_whole_segments_of_a_pool():
    memory = Allocator()
    kept = memory.allocate(4 * MIB)
    memory.free(memory.allocate(4 * MIB))
    memory.free(memory.allocate(12 * MIB))
    memory.free(memory.allocate(14 * MIB, pool=1))
    memory.empty_cache(0)
    assert memory.reserved == (20 + 14) * MIB
    memory.free(kept)
    memory.empty_cache()
    assert _counted(memory) == (0, 0)


@pytest.mark.parametrize(("tight", "recording", "reserved"), [(False, False, 70), (True, False, 40), (True, True, 70)])
def test_at_the_edge_of_a_cap_what_is_free_goes_back_unless_a_graph_is_recorded(tight, recording, reserved):
    memory = Allocator(tight=tight)
    memory.recording = recording
    memory.free(memory.allocate(30 * MIB))
    memory.allocate(40 * MIB)
    assert memory.reserved == reserved * MIB


def test_what_was_asked_for_is_counted_by_purpose():
    memory = Allocator()
    weight = memory.allocate(25 * MIB, "weights")
    memory.allocate(100, "activations")
    assert memory.requested == {"weights": 25 * MIB, "activations": 100}
    memory.free(weight)
    assert memory.requested["weights"] == 0


def test_counts_hold_through_any_sequence():
    chance = random.Random(0)
    memory, taken = Allocator(), []
    for _ in range(2000):
        if taken and chance.random() < 0.5:
            memory.free(taken.pop(chance.randrange(len(taken))))
        else:
            taken.append(memory.allocate(int(2 ** chance.uniform(0, 26))))
        assert memory.allocated == sum(block.size for block in taken) <= memory.reserved
        assert all(block.size >= rounded(block.requested) for block in taken)
    spans = sorted((block.address, block.address + block.size) for block in taken)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    for block in taken:
        memory.free(block)
    memory.empty_cache()
    assert _counted(memory) == (0, 0)


def test_rounding():
    assert [rounded(size) for size in (0, 1, 512, 513)] == [MIN_BLOCK, 512, 512, 1024]
    assert segment_bytes(11 * MIB) == 12 * MIB
