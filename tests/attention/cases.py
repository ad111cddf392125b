"""The attention layers of real models, and every processor that is to be tested on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention

from diffusers_turbo.attention import (
    NaiveAttnProcessor,
    SDPAAttnProcessor,
    SlicedAttnProcessor,
    TurboAttnProcessor,
    XFormersAttnProcessor,
)

MIB = 2**20
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@dataclass(frozen=True)
class Shape:
    """One attention layer as a model has it at its native size.

    Attributes:
        side: the layer sees side x side tokens.
        context: (tokens, width) of the text, None for self-attention.
    """

    name: str
    side: int
    heads: int
    head_dim: int
    context: tuple[int, int] | None = None

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


def _unet(model: str, levels: list[tuple[int, int, int]], context_width: int) -> list[Shape]:
    return [
        Shape(f"{model}-{side}x{side}-{kind}", side, heads, head_dim, context)
        for side, heads, head_dim in levels
        for kind, context in (("self", None), ("cross", (77, context_width)))
    ]


# (side, heads, head_dim) at each level with attention: the models' published unet/config.json and vae/config.json.
SHAPES = [
    *_unet("sd15", [(64, 8, 40), (32, 8, 80), (16, 8, 160), (8, 8, 160)], 768),
    *_unet("sd21", [(96, 5, 64), (48, 10, 64), (24, 20, 64), (12, 20, 64)], 1024),
    *_unet("sdxl", [(64, 10, 64), (32, 20, 64)], 2048),
    Shape("vae-512px", 64, 1, 512),
    Shape("vae-1024px", 128, 1, 512),
]

MAKERS: dict[str, Callable[[], TurboAttnProcessor]] = {
    "naive": NaiveAttnProcessor,
    "sdpa": SDPAAttnProcessor,
    "sdpa-flash": lambda: SDPAAttnProcessor("flash"),
    "sdpa-math": lambda: SDPAAttnProcessor("math"),
    "sliced": SlicedAttnProcessor,
    "sliced-rows": lambda: SlicedAttnProcessor("max", max_bytes=8192),
    "xformers": XFormersAttnProcessor,
}
# The bound that cuts a head by rows goes with the size of the layer.
TINY_MAKERS = {**MAKERS, "sliced-rows": lambda: SlicedAttnProcessor("max", max_bytes=256)}
GPU_MAKERS: dict[str, Callable[[], TurboAttnProcessor]] = {
    **MAKERS,
    "sdpa-efficient": lambda: SDPAAttnProcessor("efficient"),
    "sdpa-cudnn": lambda: SDPAAttnProcessor("cudnn"),
    "sliced-rows": lambda: SlicedAttnProcessor("max", max_bytes=64 * MIB),
}

every_processor = pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS.keys())
every_processor_on_tiny_layers = pytest.mark.parametrize("maker", TINY_MAKERS.values(), ids=TINY_MAKERS.keys())
every_gpu_processor = pytest.mark.parametrize("maker", GPU_MAKERS.values(), ids=GPU_MAKERS.keys())


def layer(
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    *,
    query_dim: int = 32,
    heads: int = 4,
    dim_head: int = 8,
    **options: Any,
) -> Attention:
    """An `Attention` layer whose weights make queries and keys of unit variance, so that the softmax has an opinion."""
    with torch.device("meta"):
        attn = Attention(query_dim=query_dim, heads=heads, dim_head=dim_head, **options)
    attn.to_empty(device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in attn.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.normal_(std=0.2).add_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return attn.to(device, dtype)


def layer_of(shape: Shape, dtype: torch.dtype, device: str = "cpu") -> Attention:
    """The layer a shape describes: the VAE's has a group norm and a residual connection, as in `AutoencoderKL`."""
    options: dict[str, Any] = {"query_dim": shape.width, "heads": shape.heads, "dim_head": shape.head_dim}
    if shape.name.startswith("vae"):
        vae = {"norm_num_groups": 32, "eps": 1e-6, "residual_connection": True, "bias": True}
        return layer(dtype, device, **options, **vae)
    return layer(dtype, device, **options, cross_attention_dim=shape.context and shape.context[1])


def inputs_of(
    shape: Shape, dtype: torch.dtype, device: str = "cpu", *, side: int | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Hidden states and context for a layer: two images (classifier-free guidance), one for the VAE."""
    side = side or shape.side
    generator = torch.Generator().manual_seed(1)

    def noise(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(device, dtype)

    if shape.name.startswith("vae"):
        return noise(1, shape.width, side, side), None
    return noise(2, side * side, shape.width), noise(2, *shape.context) if shape.context else None
