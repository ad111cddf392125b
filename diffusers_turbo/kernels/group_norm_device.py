"""The Triton side of `group_norm`: what its programs do. All see the activations as `[B, S, C]`.

Each program reaches its part of the tensor by one int64 offset and stays within it by int32: a tensor past 2^31
elements (a 4096 x 4096 decode has one) needs no second variant of a kernel, and a small one pays nothing for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .lazy import jit

if TYPE_CHECKING:
    import triton.language as tl


@jit()
def row_start(batch: tl.tensor, row: tl.tensor, rows: tl.tensor, width: tl.tensor) -> tl.tensor:
    """First element of one row of `[B, rows, width]`, in int64."""
    return (batch.to(tl.int64) * rows + row) * width


@jit()
def activate(value: tl.tensor, silu: tl.tensor) -> tl.tensor:
    """SiLU if asked for: a flag of the launch, not a variant of the kernel. exp overflows to inf, which gives -0."""
    if silu != 0:
        value = value / (1.0 + tl.exp(-value))
    return value


@jit("silu", "has_weight", "has_bias", "has_add", "has_before", "positions")
def single_kernel(
    x: tl.tensor,
    output: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    add: tl.tensor,
    before: tl.tensor,
    has_weight: tl.tensor,
    has_bias: tl.tensor,
    has_add: tl.tensor,
    has_before: tl.tensor,
    add_row: tl.tensor,
    silu: tl.tensor,
    positions: tl.tensor,
    channels: tl.tensor,
    eps: tl.tensor,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One group of one sample, all of it in registers.

    Slots run over the group's elements position by position, so that no lane idles at 10 or 60 channels a group; that
    the number is known when compiling makes the division cheap and lets neighbours be loaded together.
    """
    groups = channels // GROUP
    batch, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    slots = positions * GROUP
    index = tl.arange(0, BLOCK)
    present = index < slots
    column = index % GROUP
    channel = group * GROUP + column
    # int64 here too: a narrow group of very many channels can reach past 2^31 within one sample.
    offset = (
        row_start(batch, 0, positions, channels) + group * GROUP + (index // GROUP).to(tl.int64) * channels + column
    )
    value = tl.load(x + offset, mask=present, other=0).to(tl.float32)
    extra = tl.load(add + batch * add_row + channel, mask=present & (has_add != 0), other=0).to(tl.float32)
    value += extra + tl.load(before + channel, mask=present & (has_before != 0), other=0).to(tl.float32)

    value = tl.where(present, value - tl.sum(tl.where(present, value, 0.0), axis=0) / slots, 0.0)
    # The sum above rounds as large numbers do; what it missed is small, and so are the sums of what is left.
    missed = tl.sum(value, axis=0) / slots
    variance = tl.sum(value * value, axis=0) / slots - missed * missed
    scale = 1.0 / tl.sqrt_rn(variance + eps)

    # Last, for they take a register an element as well.
    gain = tl.load(weight + channel, mask=present & (has_weight != 0), other=1.0).to(tl.float32)
    shift = tl.load(bias + channel, mask=present & (has_bias != 0), other=0).to(tl.float32)
    result = activate((value - missed) * (scale * gain) + shift, silu)
    tl.store(output + offset, result.to(output.dtype.element_ty), mask=present)


@jit("has_add", "has_before", "positions", "groups", "together", "parts", "tiles", "tile_rows")
def partial_kernel(
    x: tl.tensor,
    partial_mean: tl.tensor,
    partial_deviation: tl.tensor,
    add: tl.tensor,
    before: tl.tensor,
    has_add: tl.tensor,
    has_before: tl.tensor,
    add_row: tl.tensor,
    positions: tl.tensor,
    channels: tl.tensor,
    groups: tl.tensor,
    together: tl.tensor,
    parts: tl.tensor,
    tiles: tl.tensor,
    tile_rows: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUPS: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> None:
    """Mean and summed squared deviation of one tile, for each group that it crosses, into `[B, tiles * parts, groups]`.

    A tile is `tile_rows` positions of `together` whole groups, or, where a group is wider than `COLUMNS`, of one of
    its `parts`.
    """
    batch, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    block, part = tl.program_id(1) // parts, tl.program_id(1) % parts
    width = channels // groups
    start = tl.multiple_of(block * together * width + part * COLUMNS, ALIGNED)
    limit = tl.minimum(together * width - part * COLUMNS, channels - start)
    column = tl.arange(0, COLUMNS)
    inside = column < tl.multiple_of(limit, ALIGNED)
    row = tl.arange(0, ROWS)
    first = tile * tile_rows
    height = tl.minimum(tile_rows, positions - first)
    source = x + row_start(batch, first, positions, channels) + start + row[:, None] * channels + column[None, :]

    mean = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    deviation = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    turns = 0.0
    for done in range(0, height, ROWS):
        present = (done + row < height)[:, None] & inside[None, :]
        value = tl.load(source, mask=present, other=0).to(tl.float32)
        turns += 1.0
        delta = tl.where(present, value - mean, 0.0)
        mean += delta * (1.0 / turns)
        deviation += delta * (value - mean)
        source += ROWS * channels
    # A row of slots took part in every turn, or in all but the last.
    count = ((height - row + ROWS - 1) // ROWS).to(tl.float32)[:, None]
    centre = tl.sum(count * mean, axis=0) / height
    spread = mean - centre[None, :]
    missed = tl.sum(count * spread, axis=0) / height
    total = tl.sum(deviation + count * spread * spread, axis=0) - height * missed * missed
    # What is added to a whole channel moves its mean and changes no deviation within it.
    extra = tl.load(add + batch * add_row + start + column, mask=inside & (has_add != 0), other=0).to(tl.float32)
    extra += tl.load(before + start + column, mask=inside & (has_before != 0), other=0).to(tl.float32)
    centre += missed + extra

    group = tl.arange(0, GROUPS)
    member = ((part * COLUMNS + column) // width)[:, None] == group[None, :]
    member = member & inside[:, None]
    members = tl.maximum(tl.sum(member.to(tl.float32), axis=0), 1.0)
    group_mean = tl.sum(tl.where(member, centre[:, None], 0.0), axis=0) / members
    spread = tl.where(member, centre[:, None] - group_mean[None, :], 0.0)
    missed = tl.sum(spread, axis=0) / members
    total = tl.sum(tl.where(member, total[:, None], 0.0) + height * spread * spread, axis=0)
    total -= height * members * missed * missed
    index = block * together + group
    target = row_start(batch, tile * parts + part, tiles * parts, groups) + index
    whole = (group < together) & (index < groups)
    tl.store(partial_mean + target, group_mean + missed, mask=whole)
    tl.store(partial_deviation + target, total, mask=whole)


@jit("positions", "groups", "parts", "tiles", "tile_rows")
def finish_kernel(
    partial_mean: tl.tensor,
    partial_deviation: tl.tensor,
    whole_mean: tl.tensor,
    whole_deviation: tl.tensor,
    positions: tl.tensor,
    channels: tl.tensor,
    groups: tl.tensor,
    parts: tl.tensor,
    tiles: tl.tensor,
    tile_rows: tl.tensor,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The tiles of one group as a single one, for `apply_kernel`, where they are too many to be merged there."""
    width = channels // groups
    batch, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    entries = tiles * parts
    source = row_start(batch, 0, entries, groups) + group
    # As a float: a group may have more than 2^31 elements.
    size = positions.to(tl.float32) * width
    flat = tl.arange(0, BLOCK)

    total = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, entries, BLOCK):
        index = start + flat
        rows = tl.where(index < entries, tl.minimum(tile_rows, positions - index // parts * tile_rows), 0)
        count = rows.to(tl.float32) * tl.minimum(COLUMNS, width - index % parts * COLUMNS)
        total += count * tl.load(partial_mean + source + index * groups, mask=index < entries, other=0)
    group_mean = tl.sum(total, axis=0) / size

    total = tl.zeros([BLOCK], dtype=tl.float32)
    off = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, entries, BLOCK):
        index = start + flat
        rows = tl.where(index < entries, tl.minimum(tile_rows, positions - index // parts * tile_rows), 0)
        count = rows.to(tl.float32) * tl.minimum(COLUMNS, width - index % parts * COLUMNS)
        spread = tl.load(partial_mean + source + index * groups, mask=index < entries, other=0) - group_mean
        total += tl.load(partial_deviation + source + index * groups, mask=index < entries, other=0)
        off += count * spread
        total += count * spread * spread
    missed = tl.sum(off, axis=0) / size
    tl.store(whole_mean + batch * groups + group, group_mean + missed)
    tl.store(whole_deviation + batch * groups + group, tl.sum(total, axis=0) - size * missed * missed)


@jit(
    *("has_weight", "has_bias", "has_add", "has_before", "silu", "positions"),
    *("groups", "together", "parts", "tiles", "tile_rows", "row_tiles"),
)
def apply_kernel(
    x: tl.tensor,
    output: tl.tensor,
    partial_mean: tl.tensor,
    partial_deviation: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    add: tl.tensor,
    before: tl.tensor,
    has_weight: tl.tensor,
    has_bias: tl.tensor,
    has_add: tl.tensor,
    has_before: tl.tensor,
    add_row: tl.tensor,
    silu: tl.tensor,
    positions: tl.tensor,
    channels: tl.tensor,
    groups: tl.tensor,
    together: tl.tensor,
    parts: tl.tensor,
    tiles: tl.tensor,
    tile_rows: tl.tensor,
    row_tiles: tl.tensor,
    eps: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUPS: tl.constexpr,
    TILES: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> None:
    """Merge what the tiles of `[B, tiles, groups]` found for the groups of one tile of the output, and normalise it.

    Each group's mean is taken away before anything is scaled, which is exact for near values.
    """
    batch, tile = tl.program_id(0) // row_tiles, tl.program_id(0) % row_tiles
    block, part = tl.program_id(1) // parts, tl.program_id(1) % parts
    width = channels // groups
    start = tl.multiple_of(block * together * width + part * COLUMNS, ALIGNED)
    limit = tl.minimum(together * width - part * COLUMNS, channels - start)
    column = tl.arange(0, COLUMNS)
    inside = column < tl.multiple_of(limit, ALIGNED)
    row = tile * ROWS + tl.arange(0, ROWS)
    present = (row < positions)[:, None] & inside[None, :]
    offset = row_start(batch, tile * ROWS, positions, channels) + start
    offset += tl.arange(0, ROWS)[:, None] * channels + column[None, :]
    value = tl.load(x + offset, mask=present, other=0).to(tl.float32)

    group = tl.arange(0, GROUPS)
    known = (group < together) & (block * together + group < groups)
    entry = tl.arange(0, TILES)[:, None]
    source = row_start(batch, 0, tiles, groups) + entry * groups + (block * together + group)[None, :]
    there = (entry < tiles) & known[None, :]
    mean = tl.load(partial_mean + source, mask=there, other=0)
    deviation = tl.load(partial_deviation + source, mask=there, other=0)
    # The share of each tile in the group.
    share = tl.where(there, tl.minimum(tile_rows, positions - entry * tile_rows), 0).to(tl.float32) / positions
    centre = tl.sum(share * mean, axis=0)
    spread = tl.where(there, mean - centre[None, :], 0.0)
    missed = tl.sum(share * spread, axis=0)
    variance = tl.sum(deviation, axis=0) / (positions.to(tl.float32) * width)
    variance += tl.sum(share * spread * spread, axis=0) - missed * missed
    factor = 1.0 / tl.sqrt_rn(variance + eps)

    member = ((part * COLUMNS + column) // width)[:, None] == group[None, :]
    centre = tl.sum(tl.where(member, centre[None, :], 0.0), axis=1)
    missed = tl.sum(tl.where(member, missed[None, :], 0.0), axis=1)
    factor = tl.sum(tl.where(member, factor[None, :], 0.0), axis=1)
    channel = start + column
    extra = tl.load(add + batch * add_row + channel, mask=inside & (has_add != 0), other=0).to(tl.float32)
    extra += tl.load(before + channel, mask=inside & (has_before != 0), other=0).to(tl.float32)
    factor *= tl.load(weight + channel, mask=inside & (has_weight != 0), other=1.0).to(tl.float32)
    shift = tl.load(bias + channel, mask=inside & (has_bias != 0), other=0).to(tl.float32)
    value = (value + (extra - centre)[None, :] - missed[None, :]) * factor[None, :] + shift[None, :]
    tl.store(output + offset, activate(value, silu).to(output.dtype.element_ty), mask=present)
