"""Large pictures and large batches on a card of 8 GB and less, simulated on a larger one by a cap on the allocator.

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

from simulated_cards import apart, read_machine, required  # first: it hides the GPU from what is imported after it

# isort: split
import torch

from diffusers_turbo import auto_optimize, turbo
from tests import full_size

GB = 10**9
STEPS = 3
LIMIT_S = 300

Calls = tuple[tuple[str, dict[str, Any]], ...]
SLICES: Calls = (("enable_vae_slicing", {}),)
TILES: Calls = (("enable_vae_tiling", {"tile_size": 512}),)
EXACT_TILES: Calls = (("enable_vae_exact_tiling", {}),)
EXACT_TILES_ON_HOST: Calls = (("enable_vae_exact_tiling", {"hold_on": "host"}),)
OFFLOAD: Calls = (("enable_model_cpu_offload", {"device": "cuda"}),)  # named: the process before had no GPU
AUTO: Calls = (("auto_optimize", {}),)


@dataclass(frozen=True, kw_only=True)
class Row:
    """So many pictures of one size in a call, by which switches, on a card of how many GB.

    Attributes:
        stock_tiles: diffusers' own tiling, with tiles as large as ours.
    """

    height: int = 512
    width: int = 512
    pictures: int = 1
    calls: Calls = AUTO
    stock_tiles: bool = False
    card_gb: float = 8


LARGE: dict[str, Any] = {"height": 2224, "width": 3840}
MANY: dict[str, Any] = {"pictures": 32}
ROWS = {
    "sd15 4K, auto": Row(**LARGE),
    "sd15 32 of 512, auto": Row(**MANY),
    "sd15 4K, auto, 4 GB": Row(**LARGE, card_gb=4),
    "sd15 32 of 512, auto, 4 GB": Row(**MANY, card_gb=4),
    "sd15 32 of 512, auto, 1.5 GB": Row(**MANY, card_gb=1.5),
    "sd15 4K, exact tiles": Row(**LARGE, calls=EXACT_TILES + OFFLOAD),
    "sd15 4K, exact tiles, pictures on the host": Row(**LARGE, calls=EXACT_TILES_ON_HOST + OFFLOAD),
    "sd15 4K, our tiles": Row(**LARGE, calls=TILES + OFFLOAD),
    "sd15 4K, diffusers' tiles": Row(**LARGE, calls=OFFLOAD, stock_tiles=True),
    "sd15 4K, untiled": Row(**LARGE, calls=OFFLOAD),
    "sd15 32 of 512, slices": Row(**MANY, calls=SLICES + OFFLOAD),
    "sd15 32 of 512, tiles of 256": Row(**MANY, calls=(("enable_vae_tiling", {"tile_size": 256}), *OFFLOAD)),
    "sd15 32 of 512, neither": Row(**MANY, calls=OFFLOAD),
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
        "steps": STEPS,
        "rows": rows,
    }
    for name, row in ROWS.items():
        if name not in rows:
            pipe = load(name.split()[0])
            allowed = int(row.card_gb * GB) - data["context_bytes"]
            rows[name] = apart(functools.partial(run, row, pipe, allowed), LIMIT_S)
            print(name, rows[name], flush=True)
            path.write_text(json.dumps(data, indent=2) + "\n")


def run(row: Row, pipe: Any, allowed: int) -> dict[str, Any]:
    """Measure one row under a cap in bytes: what a card has beside the context, which it has to hold, too."""
    size = {"height": row.height, "width": row.width}
    torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.mem_get_info()[1])
    turbo(pipe)
    if row.stock_tiles:
        pipe.vae.enable_tiling()
        pipe.vae.tile_latent_min_size, pipe.vae.tile_sample_min_size = 64, 512
    found: dict[str, Any] = {"card_bytes": int(row.card_gb * GB), "allowed_bytes": allowed}
    if row.calls == AUTO:
        auto_optimize(pipe, **size, batch_size=row.pictures, steps=STEPS, vram_budget=allowed)
        plan = pipe.turbo_report().plan
        found |= {"plan": [step.action for step in plan.steps], "exact": pipe.turbo_report().exact}
        found["predicted_bytes"] = plan.after.peak_bytes if plan.after else None
    else:
        for method, options in row.calls:
            getattr(pipe, method)(**options)
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    try:
        made = pipe(["a red cat"] * row.pictures, **size, num_inference_steps=STEPS, output_type="pt")
        torch.cuda.synchronize()
        found |= {"seconds": time.perf_counter() - start, "finite": bool(made.images.isfinite().all())}
    except torch.cuda.OutOfMemoryError as error:
        found["out_of_memory"] = str(error).splitlines()[0]
    return found | {
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
