"""Code of its own for the first size, one code for all others: which axes of a call's tensors may change.

Left to itself (`dynamic=None`), Dynamo makes an axis dynamic once it has seen it change, so pictures that first become
wider and then higher are compiled three times. Height and width are one thing here: when either changes, both may.

A UNet halves the sides it is given, rounding up, once a level, and the compiler carries `(s - 1) // 2 + 1` of each
level through all that follows: it takes minutes, and fails where it has to divide the number of tokens by one of them.
So a picture whose sides are multiples of the deepest level goes in as pieces `[B, C, H / m, m, W / m, m]`, and the
compiled code begins by joining them: its sides are `m * s`, which can be halved without a remainder. Other sides are
compiled for themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten


def axis_kinds(rank: int) -> tuple[str | None, ...]:
    """Say what each axis of a tensor of diffusion models counts; None for channels, which belong to the weights.

    >>> axis_kinds(4), axis_kinds(3)
    (('batch', None, 'size', 'size'), ('batch', 'length', None))
    """
    if rank >= 4:  # [B, C, H, W], [B, C, F, H, W]
        return ("batch", None, *("size",) * (rank - 2))
    return ((), ("batch",), ("batch", None), ("batch", "length", None))[rank]  # [B], [B, C], [B, N, C]


class Pieces(NamedTuple):
    """A picture `[..., H, W]` as a view `[..., H / m, m, W / m, m]`."""

    tensor: Tensor


def smallest_step(module: nn.Module) -> int:
    """Return what the sides of a module's pictures have to be multiples of, to be halved at each level: 8 for SD1.5."""
    return int(2 ** getattr(module, "num_upsamplers", 0))


def joining(call: Callable[..., Any]) -> Callable[..., Any]:
    """Return `call` for arguments of which some may be `Pieces`."""

    def join_and_call(*args: Any, **kwargs: Any) -> Any:
        return call(*map(_joined, args), **{name: _joined(value) for name, value in kwargs.items()})

    return join_and_call


def _joined(value: Any) -> Any:
    if not isinstance(value, Pieces):
        return value
    *first, rows, step, columns, _ = value.tensor.shape
    return value.tensor.reshape(*first, rows * step, columns * step)


class MovingAxes:
    """The kinds of axes of one module's calls that were seen with another extent than in its first call."""

    def __init__(self, step: int = 1) -> None:
        """Nothing seen yet; with a step above 1, pictures whose sides are multiples of it go in as `Pieces`."""
        self.moving: frozenset[str] = frozenset()
        self.step = step
        self._first: dict[tuple[int, int], torch.Size] = {}

    def marked(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments with every tensor marked for Dynamo: static axes, and those that may change.

        The marks are on aliases: the caller's tensors stay as they are. Each call is marked, since Dynamo's guards look
        at marks too.
        """
        leaves, structure = tree_flatten((args, kwargs))
        shapes = {place: leaf.shape for place, leaf in enumerate(leaves) if type(leaf) is Tensor}
        moving = self._moving_in(shapes)
        sample = kwargs.get("sample", args[0] if args else None)
        pieces = None
        if self.step > 1 and "size" in moving:
            pieces = next((place for place in shapes if leaves[place] is sample), None)
        if pieces is not None and not self._divides(shapes[pieces]):
            pieces, moving = None, moving - {"size"}
        for place in shapes:
            leaves[place] = (self._in_pieces if place == pieces else _mark)(leaves[place], moving)
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

    def _divides(self, shape: torch.Size) -> bool:
        # of a single piece the compiler would not believe that there may be more
        return all(side % self.step == 0 and side > self.step for side in shape[-2:])

    def _in_pieces(self, sample: Tensor, moving: frozenset[str]) -> Tensor | Pieces:
        """Return the picture that the module is given in pieces, and marked."""
        if _left_alone(sample):
            return sample
        *first, rows, columns = axis_kinds(sample.dim())
        pieces = sample.detach()
        for axis in (-1, -3):
            pieces = pieces.unflatten(axis, (-1, self.step))  # type: ignore[no-untyped-call]
        return Pieces(_mark(pieces, moving, (*first, rows, None, columns, None)))


def _mark(tensor: Tensor, moving: frozenset[str], kinds: tuple[str | None, ...] | None = None) -> Tensor:
    if _left_alone(tensor):
        return tensor
    # not a view: of a view Dynamo looks at the base as well, which carries no marks
    alias = tensor.detach()
    for axis, kind in enumerate(kinds or axis_kinds(tensor.dim())):
        if kind in moving:
            torch._dynamo.maybe_mark_dynamic(alias, axis)  # type: ignore[no-untyped-call, unused-ignore]
        else:
            torch._dynamo.mark_static(alias, axis)  # type: ignore[no-untyped-call, unused-ignore]
    return alias


def _left_alone(tensor: Tensor) -> bool:
    """Whether to pass a tensor on as it is: what the caller marked is the caller's; one that learns has a history."""
    return tensor.requires_grad or not tensor.dim() or any(name.startswith("_dynamo") for name in vars(tensor))
