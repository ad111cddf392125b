"""Code of its own for the first size, one code for all others: which axes of a call's tensors may change.

Left to itself (`dynamic=None`), Dynamo makes an axis dynamic once it has seen it change, so pictures that first become
wider and then higher are compiled three times. Height and width are one thing here: when either changes, both may.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten


def axis_kinds(rank: int) -> tuple[str | None, ...]:
    """Say what each axis of a tensor of diffusion models counts; None for channels, which belong to the weights.

    >>> axis_kinds(4), axis_kinds(3)
    (('batch', None, 'size', 'size'), ('batch', 'length', None))
    """
    if rank >= 4:  # [B, C, H, W], [B, C, F, H, W]
        return ("batch", None, *("size",) * (rank - 2))
    return ((), ("batch",), ("batch", None), ("batch", "length", None))[rank]  # [B], [B, C], [B, N, C]


class MovingAxes:
    """The kinds of axes of one module's calls that were seen with another extent than in its first call."""

    def __init__(self) -> None:
        """Nothing seen yet."""
        self.moving: frozenset[str] = frozenset()
        self._first: dict[tuple[int, int], torch.Size] = {}

    def marked(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments with every tensor marked for Dynamo: static axes, and those that may change.

        The marks are on aliases: the caller's tensors stay as they are. Each call is marked, since Dynamo's guards look
        at marks too.
        """
        leaves, structure = tree_flatten((args, kwargs))
        shapes = {place: leaf.shape for place, leaf in enumerate(leaves) if type(leaf) is Tensor}
        moving = self._moving_in(shapes)
        for place in shapes:
            leaves[place] = _mark(leaves[place], moving)
        marked: tuple[tuple[Any, ...], dict[str, Any]] = tree_unflatten(leaves, structure)
        return marked

    def _moving_in(self, shapes: dict[int, torch.Size]) -> frozenset[str]:
        """Return the kinds of axes to mark in a call of these shapes; none in one that is like the first."""
        first = [self._first.setdefault((place, len(shape)), shape) for place, shape in shapes.items()]
        changed = [pair for pair in zip(first, shapes.values(), strict=True) if pair[0] != pair[1]]
        for before, now in changed:
            kinds = zip(axis_kinds(len(now)), before, now, strict=True)
            self.moving |= {kind for kind, old, new in kinds if kind is not None and old != new}
        return self.moving if changed else frozenset()


def _mark(tensor: Tensor, moving: frozenset[str]) -> Tensor:
    # what the caller marked is the caller's decision; one that learns would lose its history
    if tensor.requires_grad or not tensor.dim() or any(name.startswith("_dynamo") for name in vars(tensor)):
        return tensor
    # not a view: of a view Dynamo looks at the base as well, which carries no marks
    alias = tensor.detach()
    for axis, kind in enumerate(axis_kinds(tensor.dim())):
        if kind in moving:
            torch._dynamo.maybe_mark_dynamic(alias, axis)  # type: ignore[no-untyped-call, unused-ignore]
        else:
            torch._dynamo.mark_static(alias, axis)  # type: ignore[no-untyped-call, unused-ignore]
    return alias
