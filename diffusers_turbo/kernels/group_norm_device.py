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
def held_kernel(
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
    # int64 here too: a narrow group of very many channels can reach past 2^31 within one sample. With `channel`
    # in place of its two parts registers spill.
    offset = (
        row_start(batch, 0, positions, channels) + group * GROUP + (index // GROUP).to(tl.int64) * channels + column
    )
    value = tl.load(x + offset, mask=present, other=0).to(tl.float32)
    # Branches, which all threads take together: even a load that is masked out takes its turn.
    if has_add != 0:
        value += tl.load(add + batch * add_row + channel, mask=present, other=0).to(tl.float32)
    if has_before != 0:
        value += tl.load(before + channel, mask=present, other=0).to(tl.float32)

    value = tl.where(present, value - tl.sum(tl.where(present, value, 0.0), axis=0) / slots, 0.0)
    # The sum above rounds as large numbers do; what it missed is small, and so are the sums of what is left.
    missed = tl.sum(value, axis=0) / slots
    variance = tl.sum(value * value, axis=0) / slots - missed * missed
    scale = 1.0 / tl.sqrt_rn(variance + eps)

    # Last, for they take a register an element as well.
    value = (value - missed) * scale
    if has_weight != 0:
        value *= tl.load(weight + channel, mask=present, other=0).to(tl.float32)
    if has_bias != 0:
        value += tl.load(bias + channel, mask=present, other=0).to(tl.float32)
    tl.store(output + offset, activate(value, silu).to(output.dtype.element_ty), mask=present)


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
    """One group of one sample: statistics, and then its elements once more, from cache.

    Slots run over the group's elements position by position, so that few lanes idle at 10 or 60 channels a group. They
    are of whole positions: each slot has one channel in all turns, whose values it finds and loads once.
    """
    ROWS: tl.constexpr = BLOCK // GROUP
    groups = channels // GROUP
    batch, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    slots = positions * GROUP
    flat = tl.arange(0, BLOCK)
    row = flat // GROUP
    inside = row < ROWS
    channel = group * GROUP + flat % GROUP
    # int64 here too: a narrow group of very many channels can reach past 2^31 within one sample.
    offset = row.to(tl.int64) * channels + channel

    extra = tl.zeros([BLOCK], dtype=tl.float32)
    mean = tl.zeros([BLOCK], dtype=tl.float32)
    deviation = tl.zeros([BLOCK], dtype=tl.float32)
    turns = 0.0
    # Branches, which all threads take together: even a load that is masked out takes its turn.
    if has_add != 0:
        extra += tl.load(add + batch * add_row + channel, mask=inside, other=0).to(tl.float32)
    if has_before != 0:
        extra += tl.load(before + channel, mask=inside, other=0).to(tl.float32)
    for first in range(0, positions, ROWS):
        present = inside & (first + row < positions)
        value = tl.load(x + row_start(batch, first, positions, channels) + offset, mask=present, other=0)
        value = value.to(tl.float32) + extra
        turns += 1.0
        delta = tl.where(present, value - mean, 0.0)
        mean += delta * (1.0 / turns)
        deviation += delta * (value - mean)
    # A slot took part in every turn, or in all but the last.
    count = tl.where(inside, (positions - row + ROWS - 1) // ROWS, 0).to(tl.float32)
    centre = tl.sum(count * mean, axis=0) / slots
    # The sum above rounds as large numbers do; what it missed is small, and so are the sums of what is left.
    spread = mean - centre
    missed = tl.sum(count * spread, axis=0) / slots
    variance = tl.sum(deviation + count * spread * spread, axis=0) / slots - missed * missed

    gain = tl.zeros([BLOCK], dtype=tl.float32) + 1.0 / tl.sqrt_rn(variance + eps)
    shift = tl.zeros([BLOCK], dtype=tl.float32)
    if has_weight != 0:
        gain *= tl.load(weight + channel, mask=inside, other=0).to(tl.float32)
    if has_bias != 0:
        shift += tl.load(bias + channel, mask=inside, other=0).to(tl.float32)
    for first in range(0, positions, ROWS):
        present = inside & (first + row < positions)
        source = row_start(batch, first, positions, channels)
        value = tl.load(x + source + offset, mask=present, other=0).to(tl.float32)
        value = (value + extra - centre - missed) * gain + shift
        tl.store(output + source + offset, activate(value, silu).to(output.dtype.element_ty), mask=present)


@jit("positions", "tiles", "tile_rows")
def partial_kernel(
    x: tl.tensor,
    partial_mean: tl.tensor,
    partial_deviation: tl.tensor,
    positions: tl.tensor,
    channels: tl.tensor,
    tiles: tl.tensor,
    tile_rows: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Mean and summed squared deviation of each channel over one tile of positions, into two `[B, tiles, C]`."""
    batch, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    row = tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    first = tile * tile_rows
    height = tl.minimum(tile_rows, positions - first)
    source = x + row_start(batch, first, positions, channels) + row[:, None] * channels + column[None, :]

    mean = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    deviation = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    turns = 0.0
    for start in range(0, height, ROWS):
        present = (start + row < height)[:, None] & (column < channels)[None, :]
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
    target = row_start(batch, tile, tiles, channels) + column
    tl.store(partial_mean + target, centre + missed, mask=column < channels)
    tl.store(partial_deviation + target, total, mask=column < channels)


@jit("has_weight", "has_add", "has_before", "positions", "groups", "tiles", "tile_rows")
def finish_kernel(
    partial_mean: tl.tensor,
    partial_deviation: tl.tensor,
    scale: tl.tensor,
    centre: tl.tensor,
    weight: tl.tensor,
    add: tl.tensor,
    before: tl.tensor,
    has_weight: tl.tensor,
    has_add: tl.tensor,
    has_before: tl.tensor,
    add_row: tl.tensor,
    positions: tl.tensor,
    channels: tl.tensor,
    groups: tl.tensor,
    tiles: tl.tensor,
    tile_rows: tl.tensor,
    eps: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """From the tiles of one group: what `apply_kernel` takes from each of its channels and multiplies with.

    What is added to a whole channel moves its mean and changes no deviation within it, so that only here it is added.
    """
    width = channels // groups
    batch, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    source = row_start(batch, 0, tiles, channels) + group * width
    extras = add + batch * add_row + group * width
    known = before + group * width
    slots = tiles * width
    # As a float: a group may have more than 2^31 elements.
    size = positions.to(tl.float32) * width
    flat = tl.arange(0, BLOCK)

    count = tl.zeros([BLOCK], dtype=tl.float32)
    mean = tl.zeros([BLOCK], dtype=tl.float32)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, slots, BLOCK):
        index = start + flat
        tile, column = index // width, index % width
        there = index < slots
        found = tl.load(partial_mean + source + tile * channels + column, mask=there, other=0)
        spread = tl.load(partial_deviation + source + tile * channels + column, mask=there, other=0)
        if has_add != 0:
            found += tl.load(extras + column, mask=there, other=0).to(tl.float32)
        if has_before != 0:
            found += tl.load(known + column, mask=there, other=0).to(tl.float32)
        more = tl.where(there, tl.minimum(tile_rows, positions - tile * tile_rows), 0).to(tl.float32)
        share = more / tl.maximum(count + more, 1.0)
        delta = found - mean
        total += spread + delta * delta * (count * share)
        mean += delta * share
        count += more
    group_mean = tl.sum(count * mean, axis=0) / size
    off = mean - group_mean
    missed = tl.sum(count * off, axis=0) / size
    variance = tl.sum(total + count * off * off, axis=0) / size - missed * missed
    factor = 1.0 / tl.sqrt_rn(variance + eps)

    target = batch * channels + group * width
    for start in range(0, width, BLOCK):
        column = start + flat
        inside = column < width
        gain = tl.load(weight + group * width + column, mask=inside & (has_weight != 0), other=1.0).to(tl.float32)
        extra = tl.load(extras + column, mask=inside & (has_add != 0), other=0).to(tl.float32)
        extra += tl.load(known + column, mask=inside & (has_before != 0), other=0).to(tl.float32)
        tl.store(scale + target + column, factor * gain, mask=inside)
        tl.store(centre + target + column, group_mean - extra + missed, mask=inside)


@jit("has_bias", "silu", "positions", "tiles")
def apply_kernel(
    x: tl.tensor,
    output: tl.tensor,
    scale: tl.tensor,
    centre: tl.tensor,
    bias: tl.tensor,
    has_bias: tl.tensor,
    silu: tl.tensor,
    positions: tl.tensor,
    channels: tl.tensor,
    tiles: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """One tile: take each channel's centre away, which is exact for near values, and only then scale and shift."""
    batch, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    row = tl.arange(0, ROWS)[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = column < channels
    present = (tile * ROWS + row < positions) & inside
    offset = row_start(batch, tile * ROWS, positions, channels) + (row * channels + column)
    value = tl.load(x + offset, mask=present, other=0).to(tl.float32)
    value -= tl.load(centre + batch * channels + column, mask=inside, other=0)
    value *= tl.load(scale + batch * channels + column, mask=inside, other=0)
    value += tl.load(bias + column, mask=inside & (has_bias != 0), other=0).to(tl.float32)
    tl.store(output + offset, activate(value, silu).to(output.dtype.element_ty), mask=present)
