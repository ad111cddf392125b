"""Which weights stay on the device when not all of them fit: sums over sizes, in the order in which they are used.

Neighbours are joined into groups, of which the more even they are the fewer are needed to keep copies going; the
groups that are streamed are spread evenly through the forward, so that each copy has computation to hide behind.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

ALIGNMENT = 512
"""Bytes to which CUDA's allocator rounds what it hands out, and to which tensors in a shared buffer are aligned."""

SMALL_BYTES = 16 * 2**10
"""Layers up to this size, norms above all, do not come alone: they cost a copy each and no room to speak of, and tiles
share the statistics only of norms without hooks."""

SLAB_BYTES = 64 * 2**20
"""Memory is page-locked in pieces of at most this size, or as large as the largest weight."""


def aligned(size: int) -> int:
    """Round a size up to the alignment.

    >>> aligned(1), aligned(512)
    (512, 512)
    """
    return -(-size // ALIGNMENT) * ALIGNMENT


def join_neighbours(sizes: Sequence[int]) -> list[range]:
    """Join neighbours into groups as large as the largest of them, which needs that much room anyway.

    >>> join_neighbours([3, 1, 1, 1, 1])
    [range(0, 1), range(1, 4), range(4, 5)]
    """
    most = max(sizes, default=0)
    groups: list[range] = []
    held = 0
    for index, size in enumerate(sizes):
        if groups and held + size <= most:
            groups[-1] = range(groups[-1].start, index + 1)
            held += size
        else:
            groups.append(range(index, index + 1))
            held = size
    return groups


def choose_streamed(sizes: Sequence[int], resident_bytes: int) -> frozenset[int]:
    """Return which groups are streamed so that the others fit into `resident_bytes`, evenly spread by bytes.

    From the end: the first groups stay, behind which the first copy of a forward hides.

    >>> sorted(choose_streamed([1] * 6, 4))
    [2, 5]
    """
    total = sum(sizes)
    over = total - resident_bytes
    if over <= 0:
        return frozenset()
    streamed: set[int] = set()
    passed = sent = 0
    for index in reversed(range(len(sizes))):
        passed += sizes[index]
        # what should have been sent by here is over / total of what was passed
        if sent * total < over * passed:
            streamed.add(index)
            sent += sizes[index]
    # the last one chosen may have been more than was needed
    for index in sorted(streamed, key=lambda index: -sizes[index]):
        if sent - sizes[index] >= over:
            streamed.remove(index)
            sent -= sizes[index]
    return frozenset(streamed)


def window_sizes(sizes: Sequence[int], streamed: Collection[int], most: int) -> list[int]:
    """Return the sizes of the buffers that streamed groups pass through: of `most` of them, if there are so many.

    >>> window_sizes([5, 3, 9], {0, 1}, 2)
    [5, 5]
    """
    return [max(sizes[index] for index in streamed)] * min(most, len(streamed)) if streamed else []


@dataclass(frozen=True)
class Slabs:
    """Pieces of memory by size, and for each item which piece holds it from which byte on; None: there is no room."""

    sizes: tuple[int, ...]
    places: tuple[tuple[int, int] | None, ...]


def pack(sizes: Sequence[int], budget_bytes: int) -> Slabs:
    """Pack items into pieces that add up to no more than the budget, first come first in.

    >>> pack([3, 2, 4], budget_bytes=8)
    Slabs(sizes=(5,), places=((0, 0), (0, 3), None))
    """
    whole = max(SLAB_BYTES, *sizes, 1)
    slabs: list[int] = []
    filled: list[int] = []
    places: list[tuple[int, int] | None] = []
    for size in sizes:
        slab = next((index for index, held in enumerate(filled) if held + size <= slabs[index]), None)
        if slab is None:
            new = min(whole, budget_bytes - sum(slabs))
            if new < size:
                places.append(None)
                continue
            slab = len(slabs)
            slabs.append(new)
            filled.append(0)
        places.append((slab, filled[slab]))
        filled[slab] += size
    return Slabs(tuple(filled), tuple(places))
