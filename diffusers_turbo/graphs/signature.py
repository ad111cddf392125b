"""What a graph is keyed by: everything about a call that a replay could not see, since a graph bakes it in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.memory_format)
"""Arguments that are compared by value. Anything else but tensors makes a call that cannot be keyed."""


MODE = "_turbo_mode"
"""Attribute of a module in which a call over it says how it is called, where its arguments do not show that."""


@dataclass(frozen=True)
class Signature:
    """The key of one call: its structure, its tensors' layouts, its plain values, and the modes it runs under."""

    structure: TreeSpec
    leaves: tuple[Any, ...]
    modes: tuple[Any, ...]


def flatten(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], TreeSpec]:
    """Return the leaves of a call's arguments, and their structure."""
    return tree_flatten((args, kwargs))


def signature_of(leaves: list[Any], structure: TreeSpec, device: torch.device, mode: object = None) -> Signature | None:
    """Return the key of a call in a `MODE`, None when it holds an argument that is neither tensor nor plain value."""
    keys: list[Any] = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            keys.append((Tensor, leaf.shape, leaf.dtype, leaf.stride(), leaf.is_conj() or leaf.is_neg()))
        elif isinstance(leaf, PLAIN):
            # 1, 1.0 and True are equal and hash alike, and are not the same to a kernel
            keys.append((type(leaf), leaf))
        else:
            return None
    return Signature(structure, tuple(keys), (*modes_of(device), mode))


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


def unflatten(leaves: list[Any], structure: TreeSpec) -> Any:
    """Put leaves back into their structure."""
    return tree_unflatten(leaves, structure)
