"""Fused QKV: the projections of attention as one matrix product a layer.

The fused weights are copies. They are filled anew when a call begins, so that a LoRA fused into the weights meanwhile
is never bypassed, and the processors leave them aside while an adapter wraps one of the projections.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..attention import attention_layers
from ..attention.base import are_plain
from ..errors import NotSupportedError, explain_failure
from ..planning.options import FusedQKV
from .components import denoiser_of, modules_of, require_plain_weights
from .undo import Journal, journaling

FUSED_FROM = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}
"""The modules that diffusers' `Attention.fuse_projections()` adds to a layer, and what each is a copy of."""


@dataclass
class RefillFused:
    """Call scope: copy the projections into the fused weights before the call."""

    layers: list[Any]

    @contextmanager
    def around_call(self, pipe: Any) -> Iterator[None]:
        """Refill, then run the call."""
        for attn in self.layers:
            refill(attn)
        yield


def apply(pipe: Any, options: FusedQKV) -> Journal:
    """Exact: project queries, keys and values (for cross-attention keys and values) by one product a layer."""
    tried = "fuse_qkv_projections()"
    require_plain_weights(pipe, tried)
    roots: dict[str, nn.Module] = {}
    if options.unet:
        name, module = denoiser_of(pipe, tried)
        roots[name] = module
    if options.vae and "vae" in modules_of(pipe):
        roots["vae"] = modules_of(pipe)["vae"]
    layers = [attn for root in roots.values() for attn in attention_layers(root).values()]
    fusable = [attn for attn in layers if _plain_projections(attn)]
    if not fusable:
        found = f"{len(layers)} attention layers in {', '.join(roots)}, none with plain separate projections"
        raise NotSupportedError(explain_failure(tried, found, "plain nn.Linear projections", "unload adapters first"))
    with journaling() as journal:
        for attn in fusable:
            with journal.watching(attn, *FUSED_FROM, "fused_projections"):
                attn.fuse_projections()
        journal.scopes.append(RefillFused(fusable))
        journal.note(f"{len(fusable)} of {len(layers)} layers fused in {', '.join(roots)}")
    return journal


def _plain_projections(attn: Any) -> bool:
    """Whether the layer's projections are plain linear layers, not fused yet and not wrapped by an adapter."""
    return not attn.fused_projections and are_plain(attn.to_q, attn.to_k, attn.to_v)


@torch.no_grad()
def refill(attn: Any) -> None:
    """Copy a layer's projections into its fused weights, which take on their dtype."""
    for name, parts in FUSED_FROM.items():
        fused, sources = getattr(attn, name, None), [getattr(attn, part, None) for part in parts]
        if fused is None or not are_plain(*sources):
            continue
        for field in ("weight", "bias"):
            target = getattr(fused, field)
            if target is None or target.device.type == "meta":
                continue
            together = torch.cat([getattr(source, field) for source in sources])
            if target.dtype == together.dtype:
                target.copy_(together)
            else:
                target.data = together
