"""Fused QKV: the projections of attention as one matrix product a layer.

The separate weights become slices of the fused ones, so that nothing is stored twice and a change of either is one of
both. A fused weight is a buffer that is not saved: checkpoints hold what they always held. Where something has taken
the slices apart (a move to another device, an exchange of `.data`), they are joined again when a call begins, and the
processors leave the fused weights aside while an adapter wraps one of the projections.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

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
"""The modules that diffusers' `Attention.fuse_projections()` adds to a layer, and what each is made of."""


@dataclass
class JoinProjections:
    """Call scope: what was taken apart meanwhile is joined before the call."""

    layers: list[Any]

    @contextmanager
    def around_call(self, pipe: Any) -> Iterator[None]:
        """Join, then run the call."""
        for attn in self.layers:
            join(attn)
        yield


@dataclass
class Joined:
    """A layer whose projections were made slices of its fused weights."""

    attn: Any

    def revert(self) -> None:
        """Give each projection memory of its own again."""
        for whole, sources in _fused_weights(self.attn):
            for source, in_place in zip(sources, _are_in_place(sources, whole), strict=True):
                if in_place:
                    source.data = source.data.clone()


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
            for fused in filter(None, (getattr(attn, name, None) for name in FUSED_FROM)):
                _leave_out_of_checkpoints(fused)
            join(attn)
            journal.add(Joined(attn))
        journal.scopes.append(JoinProjections(fusable))
        journal.note(f"{len(fusable)} of {len(layers)} layers fused in {', '.join(roots)}")
    return journal


def _plain_projections(attn: Any) -> bool:
    """Whether the layer's projections are plain linear layers, not fused yet and not wrapped by an adapter."""
    return not attn.fused_projections and are_plain(attn.to_q, attn.to_k, attn.to_v)


def _leave_out_of_checkpoints(fused: nn.Module) -> None:
    """Make a fused layer's parameters buffers that no state dict has."""
    for field, weight in list(fused.named_parameters()):
        delattr(fused, field)
        fused.register_buffer(field, weight.data, persistent=False)


def join(attn: Any) -> None:
    """Make a layer's projections slices of its fused weights, which take on their values, dtype and device.

    Weights that offload has taken away, and left on the meta device, have no values to take on.
    """
    for whole, sources in _fused_weights(attn):
        gone = sources[0].is_meta and not whole.is_meta
        if not gone and not all(_are_in_place(sources, whole)):
            _join(sources, whole)


@torch.inference_mode(False)
@torch.no_grad()
def _join(sources: list[Tensor], whole: Tensor) -> None:
    together = torch.cat([source.data for source in sources])
    if (whole.dtype, whole.device) == (together.dtype, together.device):
        whole.copy_(together)
    else:
        whole.data = together
    for source, part in zip(sources, whole.data.split_with_sizes([len(source) for source in sources]), strict=True):
        source.data = part


def _fused_weights(attn: Any) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Give each fused weight and bias of a layer with the separate ones, while no adapter wraps these."""
    modules = attn._modules  # of every layer at every call: attributes of modules are slow to look up
    for name, parts in FUSED_FROM.items():
        if (fused := modules.get(name)) is None:
            continue
        projections = [modules.get(part) for part in parts]
        if are_plain(*projections):
            for field, whole in fused._buffers.items():
                if whole is not None:
                    yield whole, [projection._parameters[field] for projection in projections]


def _are_in_place(sources: list[Tensor], whole: Tensor) -> list[bool]:
    """Of each part of a whole, in their order, whether it lies where it belongs."""
    found: list[bool] = []
    dtype, size = whole.dtype, whole.element_size()
    storage, address = _place(whole)
    for source in sources:
        found.append(_place(source) == (storage, address) and source.dtype == dtype and source.is_contiguous())
        address += source.numel() * size
    return found


def _place(tensor: Tensor) -> tuple[int, int]:
    """Where a tensor begins: its address; on the meta device, where there is none, its place in its storage."""
    if tensor.is_meta:
        return tensor.untyped_storage()._cdata, int(tensor.storage_offset()) * tensor.element_size()
    return 0, tensor.data_ptr()
