"""What a graph is keyed by: everything about a call that a replay could not see, since a graph bakes it in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.memory_format)
"""Arguments that are compared by value. Anything else but tensors makes a call that cannot be keyed."""


@dataclass(frozen=True)
class Signature:
    """The key of one call: its structure, its tensors' layouts, its plain values, and the modes it runs under."""

    structure: TreeSpec
    leaves: tuple[Any, ...]
    modes: tuple[Any, ...]


def flatten(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], TreeSpec]:
    """Return the leaves of a call's arguments, and their structure."""
    return tree_flatten((args, kwargs))


def signature_of(leaves: list[Any], structure: TreeSpec, device: torch.device) -> Signature | None:
    """Return the key of a call, None when it holds an argument that is neither tensor nor plain value."""
    keys: list[Any] = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            keys.append((Tensor, leaf.shape, leaf.dtype, leaf.stride(), leaf.is_conj() or leaf.is_neg()))
        elif isinstance(leaf, PLAIN):
            # 1, 1.0 and True are equal and hash alike, and are not the same to a kernel
            keys.append((type(leaf), leaf))
        else:
            return None
    return Signature(structure, tuple(keys), modes_of(device))


def modes_of(device: torch.device) -> tuple[Any, ...]:
    """Return the settings outside of a call's arguments that decide what it computes."""
    kind = device.type
    return (
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
        torch.backends.cuda.matmul.fp32_precision,
        torch.backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
        torch.backends.cudnn.enabled,
        torch.are_deterministic_algorithms_enabled(),
    )


def static_copies(leaves: list[Any], device: torch.device) -> list[Any]:
    """Return the leaves with each tensor replaced by one of its own on `device`, with the same strides and values."""

    def own(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        made = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=device)
        _distinct(made).copy_(_distinct(leaf))
        return made

    return [own(leaf) for leaf in leaves]


def fill(static: list[Any], leaves: list[Any]) -> None:
    """Copy the tensors of a call into those that a graph reads from."""
    for target, source in zip(static, leaves, strict=True):
        if isinstance(target, Tensor):
            _distinct(target).copy_(_distinct(source), non_blocking=True)


def _distinct(tensor: Tensor) -> Tensor:
    """A view of an expanded tensor without the repetitions, which cannot be written to."""
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if stride == 0 and size > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def unflatten(leaves: list[Any], structure: TreeSpec) -> Any:
    """Put leaves back into their structure."""
    return tree_unflatten(leaves, structure)
