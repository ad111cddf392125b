"""Which processors there are, which layers of a model they may take, and which one suits a device best."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..modules import modules_in
from .base import TurboAttnProcessor
from .limits import AttentionLayer
from .naive import NaiveAttnProcessor
from .sdpa import SDPAAttnProcessor
from .sliced import SlicedAttnProcessor
from .xformers import XFormersAttnProcessor

PROCESSORS: Mapping[str, type[TurboAttnProcessor]] = {
    "naive": NaiveAttnProcessor,
    "sdpa": SDPAAttnProcessor,
    "sliced": SlicedAttnProcessor,
    "xformers": XFormersAttnProcessor,
}

# diffusers' processors that compute plain attention, and the kinds of layer they are made for. Every other one does
# more than that (IP-Adapter, PAG, rotary embeddings) and is never replaced.
_REPLACEABLE: Mapping[str, tuple[str, ...]] = {
    "AttnProcessor": ("plain",),
    "AttnProcessor2_0": ("plain",),
    "FusedAttnProcessor2_0": ("plain",),
    "SlicedAttnProcessor": ("plain",),
    "XFormersAttnProcessor": ("plain",),
    "AttnAddedKVProcessor": ("added_kv",),
    "AttnAddedKVProcessor2_0": ("added_kv",),
    "SlicedAttnAddedKVProcessor": ("added_kv",),
    "XFormersAttnAddedKVProcessor": ("added_kv",),
    # SD3.5 also has image-only attention, run by the same processor without a context.
    "JointAttnProcessor2_0": ("joint", "plain"),
    "FusedJointAttnProcessor2_0": ("joint", "plain"),
    "XFormersJointAttnProcessor": ("joint", "plain"),
}


def attention_layers(model: nn.Module) -> dict[str, Any]:
    """The diffusers `Attention` modules of a model, by dotted name."""
    from diffusers.models.attention_processor import Attention

    return {name: module for name, module in model.named_modules() if isinstance(module, Attention)}


def attention_modules(model: nn.Module) -> list[Any]:
    """The same without their names, which take most of the time."""
    from diffusers.models.attention_processor import Attention

    return [module for module in modules_in(model) if isinstance(module, Attention)]


def why_kept(processor: object, kind: str | None = None) -> str | None:
    """Why a processor found on an attention layer must not be replaced; None when it may be.

    Only exactly known types may be: a subclass is somebody's own, and a processor with weights would lose them.

    Args:
        processor: what the layer has now.
        kind: the layer's `layer_kind`; when given, the processor must also be one made for that kind.
    """
    from diffusers.models import attention_processor as host

    if type(processor) in PROCESSORS.values():
        return None
    name = type(processor).__name__
    if name not in _REPLACEABLE or type(processor) is not getattr(host, name, None):
        weights = isinstance(processor, nn.Module) and any(True for _ in processor.parameters())
        return f"{name} does more than plain attention" + (" and holds weights" if weights else "")
    if kind is not None and kind not in _REPLACEABLE[name]:
        return f"{name} runs a layer of kind {kind!r} in a way of its own"
    return None


def best_memory_efficient(device: torch.device, dtype: torch.dtype | None = None, head_dim: int = 64) -> str:
    """Name the method that enables the best memory-efficient attention of a device: xFormers where its kernel runs.

    Args:
        device: where the model computes.
        dtype: what it computes in; half precision on a GPU when left out, fp32 elsewhere.
        head_dim: D of its attention layers.
    """
    on_gpu = device.type == "cuda"
    dtype = dtype or (torch.float16 if on_gpu else torch.float32)
    sm = torch.cuda.get_device_capability(device) if on_gpu else None
    layer = AttentionLayer(heads=1, head_dim=head_dim, dtype=dtype, device=device, sm=sm)
    refused = XFormersAttnProcessor().reasons_here(layer)
    return "enable_sdpa" if refused else "enable_xformers_memory_efficient_attention"
