"""Large pictures and large batches on a card of 8 GB, simulated on a larger one by a cap on the allocator.

    python docs/benchmarks/large_pictures.py docs/benchmarks/large-pictures-<gpu>.json

"auto" is `auto_optimize` with what the card has as its budget; the other rows are switches by hand.
Needs a CUDA device, no download: full-size architectures with random weights, float16, text encoders included. Each row
runs in a process of its own, since the cap must be there before the first allocation. Out of memory is a result.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from diffusers_turbo import auto_optimize, turbo
from diffusers_turbo.bench.environment import read_environment
from tests import full_size

CARD_BYTES = 8 * 10**9
STEPS = 3

Calls = tuple[tuple[str, dict[str, Any]], ...]
SLICES: Calls = (("enable_vae_slicing", {}),)
TILES: Calls = (("enable_vae_tiling", {"tile_size": 512}),)
EXACT_TILES: Calls = (("enable_vae_exact_tiling", {}),)
EXACT_TILES_ON_HOST: Calls = (("enable_vae_exact_tiling", {"hold_on": "host"}),)
OFFLOAD: Calls = (("enable_model_cpu_offload", {}),)
AUTO: Calls = (("auto_optimize", {}),)

# architecture, height, width, pictures, switches; "stock" is diffusers' own tiling with the same tile
ROWS: dict[str, tuple[str, int, int, int, Calls, bool]] = {
    "sd15 4K, auto": ("sd15", 2224, 3840, 1, AUTO, False),
    "sd15 32 of 512, auto": ("sd15", 512, 512, 32, AUTO, False),
    "sd15 4K, exact tiles": ("sd15", 2224, 3840, 1, EXACT_TILES + OFFLOAD, False),
    "sd15 4K, exact tiles, pictures on the host": ("sd15", 2224, 3840, 1, EXACT_TILES_ON_HOST + OFFLOAD, False),
    "sd15 4K, our tiles": ("sd15", 2224, 3840, 1, TILES + OFFLOAD, False),
    "sd15 4K, diffusers' tiles": ("sd15", 2224, 3840, 1, OFFLOAD, True),
    "sd15 4K, untiled": ("sd15", 2224, 3840, 1, OFFLOAD, False),
    "sd15 32 of 512, slices": ("sd15", 512, 512, 32, SLICES + OFFLOAD, False),
    "sd15 32 of 512, tiles of 256": (
        "sd15",
        512,
        512,
        32,
        (("enable_vae_tiling", {"tile_size": 256}), *OFFLOAD),
        False,
    ),
    "sd15 32 of 512, neither": ("sd15", 512, 512, 32, OFFLOAD, False),
}


def main(path: Path) -> None:
    """Run each row in a process of its own and write the JSON."""
    rows: dict[str, Any] = {}
    data = {
        "environment": read_environment("cuda", measure=False),
        "card_bytes": CARD_BYTES,
        "steps": STEPS,
        "rows": rows,
    }
    for name in ROWS:
        child = subprocess.run([sys.executable, __file__, "--row", name], capture_output=True, text=True, check=False)
        last = child.stdout.strip().splitlines()[-1:]
        rows[name] = json.loads(last[0]) if last and child.returncode == 0 else {"failed": child.stderr[-2000:]}
        print(name, rows[name], flush=True)
        path.write_text(json.dumps(data, indent=2) + "\n")


def run(name: str) -> dict[str, Any]:
    """Measure one row under the cap."""
    architecture, height, width, pictures, calls, stock_tiles = ROWS[name]
    free, total = torch.cuda.mem_get_info()
    # what is gone before anything was allocated is the context, which a small card has to hold too
    allowed = CARD_BYTES - (total - free)
    torch.cuda.set_per_process_memory_fraction(allowed / total)
    pipe = turbo(full_size.build(architecture, device="cpu"))
    pipe.set_progress_bar_config(disable=True)
    if stock_tiles:
        pipe.vae.enable_tiling()
        pipe.vae.tile_latent_min_size, pipe.vae.tile_sample_min_size = 64, 512
    row: dict[str, Any] = {"allowed_bytes": allowed}
    if calls == AUTO:
        auto_optimize(pipe, height=height, width=width, batch_size=pictures, steps=STEPS, vram_budget=allowed)
        plan = pipe.turbo_report().plan
        row |= {"plan": [step.action for step in plan.steps], "exact": pipe.turbo_report().exact}
        row["predicted_bytes"] = plan.after.peak_bytes if plan.after else None
    else:
        for method, options in calls:
            getattr(pipe, method)(**options)
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    try:
        made = pipe(["a red cat"] * pictures, height=height, width=width, num_inference_steps=STEPS, output_type="pt")
        torch.cuda.synchronize()
        row |= {"seconds": time.perf_counter() - start, "finite": bool(made.images.isfinite().all())}
    except torch.cuda.OutOfMemoryError as error:
        row["out_of_memory"] = str(error).splitlines()[0]
    return row | {
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
    }


if __name__ == "__main__":
    if sys.argv[1] == "--row":
        print(json.dumps(run(sys.argv[2])))
    else:
        main(Path(sys.argv[1]))
