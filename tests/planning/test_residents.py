"""Which groups of layers stay: as many as fit, evenly spread; and how page-locked memory is parted."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusers_turbo.planning.residents import (
    SLAB_BYTES,
    choose_streamed,
    join_neighbours,
    pack,
    window_sizes,
)

SIZES = st.lists(st.integers(1, 100), min_size=1, max_size=60)


@given(sizes=SIZES)
def test_groups_are_neighbours_and_none_is_larger_than_the_largest_item(sizes):
    groups = join_neighbours(sizes)
    assert [index for group in groups for index in group] == list(range(len(sizes)))
    held = [sum(sizes[index] for index in group) for group in groups]
    assert max(held) == max(sizes)
    # no two neighbours would have gone into one
    assert all(left + sizes[group.start] > max(sizes) for left, group in zip(held, groups[1:], strict=False))


@given(sizes=SIZES, share=st.floats(0, 1.2))
def test_what_stays_fits_and_nothing_more_would(sizes, share):
    resident_bytes = int(share * sum(sizes))
    streamed = choose_streamed(sizes, resident_bytes)
    stays = sum(size for index, size in enumerate(sizes) if index not in streamed)
    assert stays <= resident_bytes
    assert all(stays + sizes[index] > resident_bytes for index in streamed)
    assert bool(streamed) == (resident_bytes < sum(sizes))


@given(count=st.integers(1, 200), share=st.floats(0, 1))
def test_streamed_groups_are_spread_evenly(count, share):
    """Of equal groups, any stretch of the forward streams its share, to one group; the first one streams last."""
    streamed = choose_streamed([1] * count, int(share * count))
    wanted = len(streamed) / count
    for start in range(count):
        passed = sum(index in streamed for index in range(start, count))
        assert abs(passed - wanted * (count - start)) < 1
    if len(streamed) <= count / 2:
        assert 0 not in streamed


@given(sizes=SIZES, fewer=st.integers(0, 3000), more=st.integers(0, 3000))
def test_more_room_never_streams_much_more(sizes, fewer, more):
    low, high = sorted((fewer, more))
    sent = [sum(sizes[index] for index in choose_streamed(sizes, room)) for room in (low, high)]
    assert sent[1] <= sent[0] + max(sizes)


@pytest.mark.parametrize(
    ("streamed", "most", "found"), [({0, 1}, 2, [5, 5]), ({0, 1}, 1, [5]), ({2}, 2, [9]), (set(), 2, [])]
)
def test_the_window_holds_the_group_that_works_and_the_one_that_comes(streamed, most, found):
    assert window_sizes([5, 3, 9], streamed, most) == found


@given(
    sizes=st.lists(st.integers(0, 3 * SLAB_BYTES), min_size=1, max_size=40),
    budget=st.integers(0, 60 * SLAB_BYTES),
)
def test_packing_keeps_to_the_budget_and_items_do_not_overlap(sizes, budget):
    slabs = pack(sizes, budget)
    assert sum(slabs.sizes) <= budget
    taken: dict[int, int] = {}
    for size, place in zip(sizes, slabs.places, strict=True):
        if place is not None:
            slab, start = place
            assert start == taken.get(slab, 0)
            taken[slab] = start + size
            assert taken[slab] <= slabs.sizes[slab]
    assert all(taken[index] == size for index, size in enumerate(slabs.sizes))  # nothing is locked for nobody
    if budget >= 2 * max(SLAB_BYTES, *sizes) * len(sizes):
        assert None not in slabs.places
