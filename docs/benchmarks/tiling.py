"""Seams of tiled decoding, diffusers' and this package's, and distance from the untiled decode (emoji model's VAE).

    python docs/benchmarks/tiling.py docs/benchmarks/tiling.json docs/benchmarks/tiling.png

On the CPU, float32. Latents are those of pictures from docs/emoji/contact_sheet.png, enlarged. The picture shows, for
one emoji over the whole picture: untiled, then eight times the difference from it, diffusers' and ours.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from PIL import Image
from torch import Tensor

from diffusers_turbo.actions.tiled_calls import TiledDecode
from diffusers_turbo.bench.environment import read_environment
from diffusers_turbo.parity import distance
from tests.seams import STEP, latents_of, load_vae, our_edges, seam, seam_excess, sheet, stock_edges

# rows and columns of emoji, side in pixels, tile in latents
PICTURES = ((1, 1, 256, 16), (2, 2, 256, 16), (2, 2, 256, 8), (2, 4, 512, 16), (2, 4, 512, 32))
OVERLAPS = (0.25, 0.5, 0.0)
AMPLIFIED = 8


@torch.no_grad()
def main(path: Path, shown: Path) -> None:
    """Measure each, print a table, write JSON and picture."""
    vae = load_vae()
    ways = {"diffusers": (vae.tiled_decode, stock_edges), "ours": (TiledDecode(vae, STEP), our_edges)}
    rows = []
    for across, down, side, tile in PICTURES:
        latents = latents_of(vae, sheet(across, down, side))
        untiled, untiled_s = timed(vae.decode, latents)
        for overlap in OVERLAPS:
            vae.tile_latent_min_size, vae.tile_sample_min_size = tile, tile * STEP
            vae.tile_overlap_factor = overlap
            row: dict[str, Any] = {"emoji": across * down, "side_px": side, "tile_px": tile * STEP, "overlap": overlap}
            made = {}
            for name, (decode, edges_of) in ways.items():
                made[name], seconds = timed(decode, latents)
                edges = edges_of(side // STEP, tile, overlap)
                apart = distance(made[name] / 2, untiled / 2)
                row[name] = {
                    "rmse": apart.rmse,
                    "psnr_db": apart.psnr_db,
                    "seam": seam(made[name], edges),
                    "untiled_seam": seam(untiled, edges),
                    "excess": seam_excess(made[name], untiled, edges),
                    "times_untiled": seconds / untiled_s,
                }
            rows.append(row)
            print(json.dumps(row), flush=True)
            if len(rows) == 1:
                show(untiled, made).save(shown)
    data = {"environment": read_environment("cpu", measure=False), "dtype": "float32", "rows": rows}
    path.write_text(json.dumps(data, indent=2) + "\n")


def timed(decode: Any, latents: Tensor) -> tuple[Tensor, float]:
    """Return the picture `[1, 3, H, W]` and the seconds it took."""
    start = time.perf_counter()
    picture = decode(latents).sample
    return picture, time.perf_counter() - start


def show(untiled: Tensor, made: dict[str, Tensor]) -> Image.Image:
    """Lay the untiled picture and the amplified differences side by side."""
    parts = [untiled, *((AMPLIFIED * (picture - untiled)) for picture in made.values())]
    pixels = torch.cat(parts, dim=3)[0].clamp(-1, 1).add(1).mul(127.5).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
