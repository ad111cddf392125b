"""VAE slicing (exact), exact and lossy VAE tiling, through the flags that diffusers' autoencoders read at each decode.

AutoencoderKL's tiles are our own (`actions.tiled_calls`); other autoencoders keep diffusers' tiling.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

from torch import nn

from ..errors import InvalidOptionError, NotSupportedError, explain_failure
from ..planning.options import VAEExactTiling, VAESlicing, VAETiling
from ..tiling.hosts import takes_our_tiles, why_not_exact
from .components import component
from .held_pictures import HeldOnHost
from .tiled_calls import ExactDecode, ExactEncode, TiledDecode, TiledEncode, TilesDone
from .undo import Journal, journaling

DEFAULT_TILE = 512
"""Largest default tile side in pixels: what Stable Diffusion 1.x's autoencoder was trained on
(https://huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5, `vae/config.json`)."""


def apply_slicing(pipe: Any, options: VAESlicing) -> Journal:
    """Exact: decode and encode the pictures of a batch one by one."""
    vae = _vae_with(pipe, "enable_slicing", "enable_vae_slicing()")
    with journaling() as journal, journal.watching(vae, "use_slicing"):
        vae.enable_slicing()  # type: ignore[operator]
    return journal


def apply_tiling(pipe: Any, options: VAETiling) -> Journal:
    """Lossy: decode and encode large pictures in overlapping, feathered tiles of `tile_size` pixels."""
    tried = f"enable_vae_tiling(tile_size={options.tile_size}, overlap={options.overlap})"
    vae = _vae_with(pipe, "enable_tiling", tried)
    tile = options.tile_size or _default_tile(pipe, vae)
    overlap = 0.25 if options.overlap is None else options.overlap
    values = _tile_attributes(vae, tile, overlap, _pixels_per_latent(vae), tried)
    with journaling() as journal:
        _switch_on(journal, vae, values)
        if takes_our_tiles(vae):
            step = _pixels_per_latent(vae)
            halves = TiledDecode(vae, step), TiledEncode(vae, step)
            _stand_in(journal, vae, *halves)
            journal.add(TilesDone(halves))
        else:
            journal.note(f"diffusers' own tiles, since this is a {type(vae).__name__}")
        border = round(tile * values.get("tile_overlap_factor", overlap))
        journal.note(f"pictures above {tile} px a side are tiled, {border} px blended; up to {tile} px nothing changes")
        own = _default_picture(pipe)
        if own is not None and own <= tile:
            journal.note(f"a no-op at this model's own size of {own} px: ask for a smaller tile_size to tile there")
    return journal


def apply_exact_tiling(pipe: Any, options: VAEExactTiling) -> Journal:
    """Exact: work in tiles that see as far as their layers look, with the group norms of the whole picture."""
    tried = f"enable_vae_exact_tiling(tile_size={options.tile_size}, hold_on={options.hold_on!r})"
    vae = _vae_with(pipe, "enable_tiling", tried)
    if found := why_not_exact(vae):
        needed = "diffusers' AutoencoderKL with a decoder of plain residual blocks"
        raise NotSupportedError(explain_failure(tried, found, needed, "use enable_vae_tiling(), which is lossy"))
    step = _pixels_per_latent(vae)
    values = _tile_attributes(vae, options.tile_size, 0.0, step, tried)
    held = HeldOnHost() if options.hold_on == "host" else None
    halves = ExactDecode(vae, options.tile_size, held), ExactEncode(vae, options.tile_size, held)
    with journaling() as journal:
        _switch_on(journal, vae, values)
        _stand_in(journal, vae, *halves)
        journal.add(TilesDone(halves))
        journal.note(f"pictures above {options.tile_size} px a side are decoded and encoded in tiles")
    return journal


def _switch_on(journal: Journal, vae: Any, values: dict[str, Any]) -> None:
    with journal.watching(vae, "use_tiling"):
        vae.enable_tiling()
    for name, value in values.items():
        journal.set_attribute(vae, name, value)


def _stand_in(journal: Journal, vae: Any, decode: Any, encode: Any) -> None:
    journal.set_attribute(vae, "tiled_decode", decode)
    journal.set_attribute(vae, "_tiled_encode", encode)


def _vae_with(pipe: Any, method: str, tried: str) -> nn.Module:
    vae = component(pipe, "vae", tried)
    if callable(getattr(vae, method, None)):
        return vae
    found = f"a {type(vae).__name__} without {method}()"
    raise NotSupportedError(explain_failure(tried, found, "an autoencoder that has it", "leave this switch off"))


def _pixels_per_latent(vae: Any) -> int:
    ratio = getattr(vae, "spatial_compression_ratio", None)
    blocks = getattr(vae.config, "block_out_channels", None)
    return int(ratio) if ratio else 2 ** (len(blocks) - 1) if blocks else 8


def _default_picture(pipe: Any) -> int | None:
    """Side in pixels of the picture the pipeline makes when no size is given."""
    side, factor = getattr(pipe, "default_sample_size", None), getattr(pipe, "vae_scale_factor", None)
    if side is None:
        side = getattr(getattr(getattr(pipe, "unet", None), "config", None), "sample_size", None)
    return side * factor if isinstance(side, int) and isinstance(factor, int) else None


def _default_tile(pipe: Any, vae: Any) -> int:
    """The largest tile that still tiles the model's own picture size: half of it, at most `DEFAULT_TILE`."""
    picture, step = _default_picture(pipe), _pixels_per_latent(vae)
    half = (picture or 2 * DEFAULT_TILE) // 2 // step * step
    return min(DEFAULT_TILE, half)


def _whole_overlap(latents: int, step: int, overlap: float) -> float:
    """Return the overlap factor nearest to `overlap` at which a tile of `latents` moves on by whole latents.

    AutoencoderKL truncates the stride in latents and the blended border in pixels apart from each other; where they do
    not meet, its pictures come out too large or with rows missing.
    """
    strides = sorted(range(1, latents + 1), key=lambda stride: abs(1 - stride / latents - overlap))
    for stride in strides:
        exact = 1 - stride / latents
        for factor in (exact, math.nextafter(exact, 1), math.nextafter(exact, 0)):
            border = (latents - stride) * step
            meets = int(latents * (1 - factor)) == stride and int(latents * step * factor) == border
            if meets and int(latents * step * (1 - factor)) == stride * step and int(latents * factor) * step == border:
                return factor
    raise AssertionError("a tile that moves on by its whole side always meets")


def _tile_attributes(vae: Any, tile: int, overlap: float, step: int, tried: str) -> dict[str, Any]:
    """Translate tile side (pixels) and overlap (fraction) into the attributes this class of autoencoder reads.

    AutoencoderKL and its kin read `tile_sample_min_size`, `tile_latent_min_size` and an overlap factor; the newer ones
    read sides and strides of their own in pixels.
    """
    if tile % step:
        needed = f"a multiple of the autoencoder's {step} pixels per latent"
        raise InvalidOptionError(
            explain_failure(tried, f"tile_size {tile}", needed, f"try {tile // step * step or step}")
        )
    if tile < 4 * step:
        needed = f"at least {4 * step} pixels, four latents a side"
        raise InvalidOptionError(explain_failure(tried, f"tile_size {tile}", needed, "ask for a larger tile"))
    if int(tile // step * (1 - overlap)) < 1:
        raise InvalidOptionError(explain_failure(tried, f"overlap {overlap}", "tiles that move on", "overlap less"))
    if hasattr(vae, "tile_latent_min_size"):
        return {
            "tile_sample_min_size": tile,
            "tile_latent_min_size": tile // step,
            "tile_overlap_factor": _whole_overlap(tile // step, step, overlap),
        }
    parameters = inspect.signature(vae.enable_tiling).parameters
    stride = max(step, int(tile * (1 - overlap)) // step * step)
    sides = {f"tile_sample_min_{side}": tile for side in ("height", "width")}
    strides = {f"tile_sample_stride_{side}": stride for side in ("height", "width")}
    if all(name in parameters for name in sides):
        latent = {f"tile_latent_min_{side}": tile // step for side in ("height", "width")}
        factors = {f"tile_overlap_factor_{side}": overlap for side in ("height", "width")}
        known = {**sides, **strides, **latent, **factors}
        return {name: value for name, value in known.items() if hasattr(vae, name)}
    found = f"a {type(vae).__name__} whose tile size cannot be set"
    raise NotSupportedError(
        explain_failure(tried, found, "tile attributes this package knows", "use vae.enable_tiling()")
    )
