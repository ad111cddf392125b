"""Which autoencoders decode in this package's tiles."""

from __future__ import annotations

from typing import Any

from .halves import refusal_of
from .statistics import poolable


def takes_our_tiles(vae: Any) -> bool:
    """Whether this is diffusers' AutoencoderKL with its own tiling, which ours can stand in for."""
    from diffusers import AutoencoderKL

    names = ("tiled_decode", "_tiled_encode", "_decode", "_encode")
    return isinstance(vae, AutoencoderKL) and all(
        getattr(type(vae), name, None) is getattr(AutoencoderKL, name, False) for name in names
    )


def why_not_exact(vae: Any) -> str:
    """Say why exact tiles cannot stand in for its tiled decoding; empty where they can."""
    return refusal_of(vae.decoder) if takes_our_tiles(vae) else f"a {type(vae).__name__}"


def decodes_in_exact_tiles(vae: Any) -> bool:
    """Whether exact tiles can stand in, and would not be one whole picture with the weights where they are now."""
    return not why_not_exact(vae) and bool(poolable(vae.decoder))
