"""What replaces the attention layers' processors, and the projections they ask for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..base import Options, is_int

SDPA_BACKENDS = ("auto", "flash", "efficient", "cudnn", "math")


@dataclass(frozen=True, kw_only=True)
class NaiveAttention(Options):
    """The reference attention, which materialises the whole score matrix."""

    action = "enable_naive_attention"
    slot = "attention"


@dataclass(frozen=True, kw_only=True)
class SDPAAttention(Options):
    """torch's scaled_dot_product_attention, with one of its backends or its own choice ("auto")."""

    action = "enable_sdpa"
    slot = "attention"

    backend: str = "auto"

    def __post_init__(self) -> None:
        self._check_choice("backend", SDPA_BACKENDS)


@dataclass(frozen=True, kw_only=True)
class XFormersAttention(Options):
    """xFormers' memory-efficient attention; `attention_op` as in diffusers, None leaves the choice to xFormers."""

    action = "enable_xformers_memory_efficient_attention"
    slot = "attention"

    attention_op: Any = None


@dataclass(frozen=True, kw_only=True)
class SlicedAttention(Options):
    """Attention in slices over batch x heads, then over query rows.

    `slice_size` is "auto" (half of the heads at a time), "max" (one head at a time) or how many heads at a time;
    `max_bytes` bounds what scores, softmax and upcast copies may take beyond q, k, v and the output.
    """

    action = "enable_attention_slicing"
    slot = "attention"

    slice_size: str | int | None = "auto"
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        size = self.slice_size
        if size not in ("auto", "max", None) and not (is_int(size) and isinstance(size, int) and size > 0):
            raise self._refuse("slice_size", '"auto", "max" or a positive number of heads', 'use "auto"')
        self._check_positive("max_bytes")


@dataclass(frozen=True, kw_only=True)
class FusedQKV(Options):
    """Compute the three projections of attention as one matrix product."""

    action = "fuse_qkv_projections"
    slot = "projections"

    unet: bool = True
    vae: bool = True

    def __post_init__(self) -> None:
        self._check_flags("unet", "vae")
        if not (self.unet or self.vae):
            raise self._refuse("unet", "the denoiser, the VAE or both", "set unet=True or vae=True")
