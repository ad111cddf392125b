"""The rules of PyTorch's CUDA caching allocator, on sizes alone: what it counts as allocated, and what it reserves.

It speaks of the allocator's own settings (PYTORCH_CUDA_ALLOC_CONF unset: no expandable segments, no largest split, no
rounding to parts of powers of two). Source: c10/cuda/CUDACachingAllocator.cpp of PyTorch
(https://github.com/pytorch/pytorch/blob/main/c10/cuda/CUDACachingAllocator.cpp), `round_size`, `get_allocation_size`,
`get_free_block` and `should_split`.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from dataclasses import dataclass

from ..planning.units import MIB

SETTINGS = "PYTORCH_CUDA_ALLOC_CONF unset (no expandable segments, no max_split_size_mb)"

MIN_BLOCK = 512
"""Sizes are rounded up to this many bytes."""

SMALL = MIB
"""Requests up to this size live in segments of their own kind."""

SMALL_SEGMENT = 2 * MIB
LARGE_SEGMENT = 20 * MIB
"""What is asked of the driver for a small request, and for one below `OWN_SEGMENT`."""

OWN_SEGMENT = 10 * MIB
"""From this size on a request gets a segment of its own size, rounded to `SEGMENT_STEP`."""

SEGMENT_STEP = 2 * MIB

DEFAULT_POOL = 0


def rounded(size: int) -> int:
    """Round a request as the allocator does.

    >>> rounded(1), rounded(1025)
    (512, 1536)
    """
    return -(-(size or 1) // MIN_BLOCK) * MIN_BLOCK


def segment_bytes(size: int) -> int:
    """Return what is asked of the driver where no free block holds a rounded request.

    >>> [segment_bytes(size) // MIB for size in (512, 2 * MIB, 25 * MIB)]
    [2, 20, 26]
    """
    if size <= SMALL:
        return SMALL_SEGMENT
    return LARGE_SEGMENT if size < OWN_SEGMENT else -(-size // SEGMENT_STEP) * SEGMENT_STEP


@dataclass(eq=False)
class Block:
    """A piece of a segment: taken or free, beside its neighbours in the same segment."""

    address: int
    size: int
    pool: tuple[int, bool]
    requested: int = 0
    category: str = ""
    taken: bool = False
    before: Block | None = None
    after: Block | None = None

    @property
    def whole(self) -> bool:
        """Whether it is a whole segment."""
        return self.before is None and self.after is None


class Allocator:
    """Takes requests and gives them back, as the caching allocator does; counts and moves nothing.

    Blocks of one `pool` (a stream's, a CUDA graph's) are never given to another. What is counted as allocated are whole
    blocks: a large one that is not worth splitting counts with the rest that nobody asked for.

    A `tight` one is at the edge of a cap: what is wholly free goes back to the driver before more is asked for, except
    while a graph is `recording`.

    >>> memory = Allocator()
    >>> block = memory.allocate(25 * MIB)
    >>> memory.allocated // MIB, memory.reserved // MIB
    (26, 26)
    """

    def __init__(self, *, tight: bool = False) -> None:
        self.tight, self.recording = tight, False
        self.allocated = self.reserved = 0
        self.requested: Counter[str] = Counter()
        self._free: dict[tuple[int, bool], list[tuple[int, int, Block]]] = {}
        self._end = 0

    def allocate(self, size: int, category: str = "", pool: int = DEFAULT_POOL) -> Block:
        """Take a block for `size` bytes: the smallest free one that holds them, else of a new segment."""
        needed = rounded(size)
        key = (pool, needed <= SMALL)
        free = self._free.setdefault(key, [])
        index = bisect_left(free, (needed, -1))
        block = free.pop(index)[2] if index < len(free) else self._new_segment(needed, key)
        rest = block.size - needed
        if rest >= MIN_BLOCK if key[1] else rest > SMALL:
            self._split(block, needed)
        block.taken, block.requested, block.category = True, size, category
        self.allocated += block.size
        self.requested[category] += size
        return block

    def free(self, block: Block) -> None:
        """Give a block back; it grows together with free neighbours."""
        block.taken = False
        self.allocated -= block.size
        self.requested[block.category] -= block.requested
        for other in (block.before, block.after):
            if other is not None and not other.taken:
                self._withdraw(other)
                block = self._joined(block, other)
        self._offer(block)

    def empty_cache(self, pool: int | None = None) -> None:
        """Return wholly free segments (of one pool, or of all) to the driver."""
        for key, free in self._free.items():
            if pool is None or key[0] == pool:
                self.reserved -= sum(block.size for _, _, block in free if block.whole)
                free[:] = [item for item in free if not item[2].whole]

    def _new_segment(self, needed: int, key: tuple[int, bool]) -> Block:
        if self.tight and not self.recording:
            self.empty_cache()
        block = Block(self._end, segment_bytes(needed), key)
        self._end += block.size
        self.reserved += block.size
        return block

    def _split(self, block: Block, needed: int) -> None:
        rest = Block(block.address + needed, block.size - needed, block.pool, before=block, after=block.after)
        if block.after is not None:
            block.after.before = rest
        block.after, block.size = rest, needed
        self._offer(rest)

    def _joined(self, block: Block, other: Block) -> Block:
        first, second = (other, block) if other is block.before else (block, other)
        first.size += second.size
        first.after = second.after
        if second.after is not None:
            second.after.before = first
        first.taken = False
        return first

    def _offer(self, block: Block) -> None:
        insort(self._free.setdefault(block.pool, []), (block.size, block.address, block))

    def _withdraw(self, block: Block) -> None:
        free = self._free[block.pool]
        del free[bisect_left(free, (block.size, block.address))]
