"""How visible the borders of tiles are, on pictures of the emoji model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from diffusers_turbo.tiling.grid import Axis

ROOT = Path(__file__).parents[1]
STEP = 8


def load_vae() -> AutoencoderKL:
    """The emoji model's autoencoder, 8 pixels per latent, in float32."""
    return AutoencoderKL.from_pretrained(ROOT / "examples" / "emoji_sd" / "vae").eval()


def sheet(rows: int, columns: int, side: int) -> Tensor:
    """Pictures of the emoji model side by side, enlarged to `[1, 3, side, side]` with values in [-1, 1]."""
    whole = np.array(Image.open(ROOT / "docs" / "emoji" / "contact_sheet.png").convert("RGB"))
    # cells of 144 x 175 pixels, with the picture of 128 at their top and its name below
    cells = [
        np.concatenate([whole[175 * r : 175 * r + 128, 8 + 144 * c : 136 + 144 * c] for c in range(columns)], axis=1)
        for r in range(rows)
    ]
    pixels = torch.from_numpy(np.concatenate(cells)).permute(2, 0, 1)[None].float() / 127.5 - 1
    return F.interpolate(pixels, size=(side, side), mode="bicubic", antialias=True).clamp(-1, 1)


@torch.no_grad()
def latents_of(vae: Any, picture: Tensor) -> Tensor:
    """Encode the whole picture at once."""
    latents: Tensor = vae.encode(picture).latent_dist.mean
    return latents


def stock_edges(length: int, tile: int, overlap: float) -> set[int]:
    """Pixels at which diffusers' tiles begin and end along an axis of `length` latents."""
    stride = int(tile * (1 - overlap))
    starts = range(0, length, stride)
    return _inner({edge for start in starts for edge in (start, start + tile)}, length)


def our_edges(length: int, tile: int, overlap: float) -> set[int]:
    """Pixels at which this package's tiles begin and end."""
    axis = Axis(length, tile, tile - int(tile * (1 - overlap)))
    return _inner({edge for start, end, _ in axis.spans() for edge in (start, end)}, length)


def _inner(edges: set[int], length: int) -> set[int]:
    return {edge * STEP for edge in edges if 0 < edge < length}


def seam(picture: Tensor, edges: set[int]) -> float:
    """Mean absolute difference of neighbouring pixels across the edges, over that of all other neighbours."""
    across, inside = [], []
    for dim in (2, 3):
        gradient = picture.diff(dim=dim).abs().double()
        crossing = torch.zeros(gradient.shape[dim], dtype=torch.bool)
        crossing[[edge - 1 for edge in edges]] = True
        across.append(gradient.movedim(dim, 0)[crossing].flatten())
        inside.append(gradient.movedim(dim, 0)[~crossing].flatten())
    return float(torch.cat(across).mean() / torch.cat(inside).mean())


def seam_excess(picture: Tensor, untiled: Tensor, edges: set[int]) -> float:
    """The seam figure over that of the untiled picture at the same places, which holds edges of its own; 1 is none."""
    return seam(picture, edges) / seam(untiled, edges)
