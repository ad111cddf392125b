"""Large pictures and large batches on a card of 8 GB, simulated on a larger one by a cap on the allocator.

    python docs/benchmarks/large_pictures.py docs/benchmarks/large-pictures-<gpu>.json

"auto" is `auto_optimize` with what the card has as its budget; the other rows are switches by hand. What the file holds
already is not run again. Needs a CUDA device to itself, no download: full-size architectures with random weights,
float16, text encoders included. Each row runs in a process of its own, since the cap must be there before the first
allocation; it is forked from this one, which holds the weights in host memory. Out of memory is a result.
"""

# ruff: noqa: E402
from __future__ import annotations

import functools
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

from simulated_cards import apart, read_machine, required  # first: it hides the GPU from what is imported after it

# isort: split
import torch

from diffusers_turbo import auto_optimize, turbo
from tests import full_size

CARD_BYTES = 8 * 10**9
STEPS = 3
LIMIT_S = 300

Calls = tuple[tuple[str, dict[str, Any]], ...]
SLICES: Calls = (("enable_vae_slicing", {}),)
TILES: Calls = (("enable_vae_tiling", {"tile_size": 512}),)
EXACT_TILES: Calls = (("enable_vae_exact_tiling", {}),)
EXACT_TILES_ON_HOST: Calls = (("enable_vae_exact_tiling", {"hold_on": "host"}),)
OFFLOAD: Calls = (("enable_model_cpu_offload", {"device": "cuda"}),)  # named: the process before had no GPU
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


@functools.lru_cache(maxsize=1)
def load(architecture: str) -> Any:
    """Make a pipeline in host memory."""
    return full_size.build(architecture, device="cpu")


def main(path: Path) -> None:
    """Run each row that the file lacks in a process of its own and write the JSON."""
    torch.set_num_threads(1)  # threads that compute do not survive a fork
    rows: dict[str, Any] = json.loads(path.read_text())["rows"] if path.exists() else {}
    data: dict[str, Any] = {
        **required(read_machine),
        "card_bytes": CARD_BYTES,
        "steps": STEPS,
        "rows": rows,
    }
    for name, (architecture, *_) in ROWS.items():
        if name not in rows:
            pipe = load(architecture)
            rows[name] = apart(functools.partial(run, name, pipe, CARD_BYTES - data["context_bytes"]), LIMIT_S)
            print(name, rows[name], flush=True)
            path.write_text(json.dumps(data, indent=2) + "\n")


def run(name: str, pipe: Any, allowed: int) -> dict[str, Any]:
    """Measure one row under a cap in bytes: what a card has beside the context, which it has to hold, too."""
    _, height, width, pictures, calls, stock_tiles = ROWS[name]
    torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.mem_get_info()[1])
    turbo(pipe)
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
    main(Path(sys.argv[1]))
