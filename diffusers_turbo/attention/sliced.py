"""Attention a slice at a time: less memory for the matrix, for more and smaller kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import product
from typing import Any, NoReturn

import torch
from torch import Tensor

from diffusers_turbo.errors import InvalidOptionError, explain_failure

from .base import TurboAttnProcessor, needs_grad
from .limits import AttentionLayer, Limits
from .naive import probabilities


@dataclass(frozen=True, kw_only=True)
class Problem:
    """The sizes of one attention: `[H, N, D]` queries over M keys, and how wide its numbers are in bytes."""

    heads: int
    n_query: int
    n_key: int
    head_dim: int
    itemsize: int
    upcast_attention: bool = False
    upcast_softmax: bool = False
    masked: bool = False


@dataclass(frozen=True)
class Slices:
    """How an attention is cut: `heads` heads of one image at a time, and of those `rows` query rows at a time."""

    heads: int
    rows: int


def bytes_per_slice(problem: Problem, heads: int, rows: int) -> int:
    """Bytes a slice of `heads` x `rows` needs at its peak, beyond queries, keys, values, mask and the output.

    The peak is the largest moment of `naive.probabilities`, which this follows line by line, and of the product after.
    """
    item = problem.itemsize
    score = max(4, item) if problem.upcast_attention else item
    weight = max(4, score) if problem.upcast_softmax else score
    matrix = heads * rows * problem.n_key
    copies = 0
    if score != item:
        copies = heads * (rows + problem.n_key) * problem.head_dim * score + (matrix * score if problem.masked else 0)
    return max(
        copies + matrix * score,
        matrix * (score + weight if weight != score else 0),
        matrix * (weight + weight),
        matrix * (weight + item if weight != item else 0),
        matrix * item + heads * rows * problem.head_dim * item,
    )


def slice_plan(problem: Problem, *, heads: int, max_bytes: int | None = None) -> Slices:
    """The largest slices of at most `heads` heads that need at most `max_bytes`.

    Heads stay whole as long as one fits; only then is a head cut by rows. A single row is never cut: where it alone
    needs more than `max_bytes`, it is taken all the same.

    >>> sd15 = Problem(heads=8, n_query=4096, n_key=4096, head_dim=40, itemsize=2)
    >>> slice_plan(sd15, heads=4), slice_plan(sd15, heads=4, max_bytes=16 * 2**20)
    (Slices(heads=4, rows=4096), Slices(heads=1, rows=1024))
    """
    heads = min(heads, problem.heads)
    if max_bytes is None:
        return Slices(heads, problem.n_query)
    fitting = _most(heads, lambda count: bytes_per_slice(problem, count, problem.n_query) <= max_bytes)
    if fitting:
        return Slices(fitting, problem.n_query)
    return Slices(1, max(1, _most(problem.n_query, lambda rows: bytes_per_slice(problem, 1, rows) <= max_bytes)))


class SlicedAttnProcessor(TurboAttnProcessor):
    """The naive formula on a few heads, and where need be a few query rows, at a time.

    For GPUs and devices without a fused kernel. Where `F.scaled_dot_product_attention` has one, that needs less memory
    than any slice, and less time. Compiled, the loop over slices is unrolled, and a new size is a new graph.

    Args:
        slice_size: heads at a time: "auto" (half of them), "max" (one), a number, or None (all).
        max_bytes: upper bound for scores, softmax and upcast copies, beyond queries, keys, values, mask and output.
            Slices get smaller than `slice_size` where this asks for it, down to one query row. While gradients are
            recorded it bounds nothing: autograd keeps the whole matrix.

    Raises:
        InvalidOptionError: for a size or bound below 1, here; for more heads than a layer has, when that layer runs.
    """

    limits = (Limits(kernel="sliced attention"),)

    def __init__(self, slice_size: int | str | None = "auto", max_bytes: int | None = None) -> None:
        if slice_size not in ("auto", "max", None) and not _is_positive(slice_size):
            _reject(f"slice_size={slice_size!r}", "'auto', 'max', None or a number of heads from 1 up", "use 'auto'")
        if max_bytes is not None and not _is_positive(max_bytes):
            _reject(f"max_bytes={max_bytes!r}", "None or a number of bytes from 1 up", "leave max_bytes out")
        self.slice_size = slice_size
        self.max_bytes = max_bytes

    def reasons(self, layer: AttentionLayer) -> list[str]:
        reasons = super().reasons(layer)
        if isinstance(self.slice_size, int) and self.slice_size > layer.heads:
            reasons.append(f"slices of {self.slice_size} heads are more than the layer's {layer.heads}")
        return reasons

    def attend(self, attn: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        batch, heads, n_query, head_dim = query.shape
        problem = Problem(
            heads=heads,
            n_query=n_query,
            n_key=key.shape[2],
            head_dim=head_dim,
            itemsize=query.element_size(),
            upcast_attention=attn.upcast_attention,
            upcast_softmax=attn.upcast_softmax,
            masked=mask is not None,
        )
        plan = slice_plan(problem, heads=heads_per_slice(self.slice_size, heads), max_bytes=self.max_bytes)

        def part(image: int, some: slice, rows: slice) -> Tensor:
            bias = None if mask is None else _part_of_mask(mask, image, some, rows)
            return probabilities(attn, query[image, some, rows], key[image, some], bias) @ value[image, some]

        head_cuts, row_cuts = cuts(heads, plan.heads), cuts(n_query, plan.rows)
        if needs_grad(query, key, value):
            return torch.stack(
                [torch.cat([torch.cat([part(i, h, r) for r in row_cuts], 1) for h in head_cuts]) for i in range(batch)]
            )
        # Laid out as the output projection reads it, so that leaving the heads copies nothing.
        output = query.new_empty(batch, n_query, heads, head_dim).transpose(1, 2)
        for i, h, r in product(range(batch), head_cuts, row_cuts):
            output[i, h, r] = part(i, h, r)
        return output


def cuts(total: int, step: int) -> list[slice]:
    """The slices of `step` that cover `range(total)`, the last one shorter where need be."""
    return [slice(start, min(start + step, total)) for start in range(0, total, step)]


def heads_per_slice(slice_size: int | str | None, heads: int) -> int:
    """Resolve `slice_size` for a layer of so many heads.

    Raises:
        InvalidOptionError: when `slice_size` is a number larger than `heads`.
    """
    if slice_size is None:
        return heads
    if slice_size == "auto":
        return max(1, heads // 2)
    if slice_size == "max":
        return 1
    if int(slice_size) > heads:
        _reject(f"slice_size={slice_size}", f"at most {heads}, the layer's heads", "use 'auto' or a smaller number")
    return int(slice_size)


def check_slice_size(slice_size: int | str | None, layers: Iterable[AttentionLayer]) -> None:
    """Raise what running would raise, before anything is changed.

    Raises:
        InvalidOptionError: when `slice_size` is a number larger than the heads of one of `layers`.
    """
    fewest = min((layer.heads for layer in layers), default=None)
    if fewest is not None:
        heads_per_slice(slice_size, fewest)


def _part_of_mask(mask: Tensor, image: int, heads: slice, rows: slice) -> Tensor:
    """The `[heads or 1, rows or 1, M]` part of a `[B or 1, H or 1, N or 1, M]` mask; sizes of 1 stay to broadcast."""
    part = mask[image if mask.shape[0] > 1 else 0]
    if part.shape[0] > 1:
        part = part[heads]
    return part[:, rows] if part.shape[1] > 1 else part


def _most(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest count from 0 to `limit` that fits, where fewer always fit if more do; 0 need not."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _is_positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _reject(found: str, needed: str, do: str) -> NoReturn:
    raise InvalidOptionError(explain_failure("SlicedAttnProcessor()", found, needed, do))
