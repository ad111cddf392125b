"""The two pipelines that a result is measured against: naive attention in fp32, and stock diffusers in its dtype."""

from __future__ import annotations

from typing import Any

import torch

from ..actions.precision import cast
from ..actions.tf32 import fp32_precision
from ..errors import NotSupportedError, TurboError, explain_failure
from .inputs import Inputs
from .pictures import Pictures, record_pictures
from .replay import Tape

SLICE_BYTES = 256 * 2**20
"""Bound on attention scores where the naive matrix does not fit."""

OFFLOAD = "enable_group_offload"

Switch = tuple[str, dict[str, Any]]

# From the plain reference to one that fits almost anywhere; each rung replaces the one before.
_LADDER: tuple[tuple[str, tuple[Switch, ...]], ...] = (
    ("naive attention", (("enable_naive_attention", {}),)),
    ("sliced attention", (("enable_attention_slicing", {"slice_size": None, "max_bytes": SLICE_BYTES}),)),
    (
        "sliced attention, weights offloaded",
        (
            ("enable_attention_slicing", {"slice_size": None, "max_bytes": SLICE_BYTES}),
            (OFFLOAD, {"offload_type": "leaf_level"}),
        ),
    ),
)


def record_reference(pipe: Any, inputs: Inputs, device: torch.device) -> tuple[Pictures, list[Tape], str]:
    """Run an untouched pipeline as the fp32 reference.

    Where the naive attention matrix does not fit into memory, attention is sliced; where the weights do not, they are
    offloaded. Both are exact.

    Args:
        pipe: an untouched pipeline; it is changed.
        inputs: what to draw.
        device: where to draw it.

    Returns:
        the pictures, the tapes to replay, and in words what the reference was.

    Raises:
        NotSupportedError: not even the last rung fits.
    """
    from ..entry import turbo  # which itself verifies

    cast(pipe, torch.float32)
    reference = turbo(pipe)
    tried: list[str] = []
    for name, switches in _LADDER:
        try:
            with fp32_precision("ieee"):  # torch's own default convolves in TF32 on a GPU
                replaced = _climb(reference, switches, device)
                pictures, tapes = record_pictures(reference, inputs)
        except torch.OutOfMemoryError:
            tried.append(name)
            reference.turbo_undo()
            reference.to("cpu")
            torch.cuda.empty_cache()
        else:
            return pictures, tapes, f"fp32, {name if replaced else 'its own attention'}"
    raise NotSupportedError(
        explain_failure(
            f"verifying a {type(pipe).__name__}",
            f"out of memory on {device} with {', then '.join(tried)}",
            "memory for the fp32 reference",
            "verify on a smaller picture, or on the CPU",
        )
    )


def _climb(reference: Any, switches: tuple[Switch, ...], device: torch.device) -> bool:
    """Bring the reference onto a rung; return False when its attention has no layers that could be replaced."""
    replaced = True
    if not any(method == OFFLOAD for method, _ in switches):
        reference.to(device)
    for method, options in switches:
        if method == OFFLOAD:
            getattr(reference, method)(onload_device=device, **options)
            continue
        try:
            getattr(reference, method)(**options)
        except TurboError:
            replaced = False
    return replaced
