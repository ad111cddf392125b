"""How far lossy levers and planted faults are from naive fp32 on the emoji model: what `CLOSE_DB` was chosen by.

    python docs/benchmarks/lossy_distances.py docs/benchmarks/lossy-distances.json

16 prompt-and-seed pairs in one batch, 10 steps, on the CPU.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from diffusers_turbo import turbo
from diffusers_turbo.bench.environment import read_environment
from diffusers_turbo.bench.loading import load_model
from diffusers_turbo.verification.check import Yardstick
from diffusers_turbo.verification.inputs import make_inputs
from tests.exactness import OBJECTS, STYLES, wrong_variants

PAIRS, STEPS = 16, 10

LEVERS: dict[str, tuple[str, dict[str, Any]]] = {
    "fp16 weights": ("enable_half_precision", {"dtype": "float16"}),
    "bf16 weights": ("enable_half_precision", {"dtype": "bfloat16"}),
    "VAE tiles of half the picture's side": ("enable_vae_tiling", {"tile_size": 64}),
}


def main(path: Path) -> None:
    """Measure each, print a table, write the JSON."""
    pipe = turbo(load_model("examples/emoji_sd", "float32", "cpu"))
    prompts = [f"a {STYLES[number % 4]} emoji of {OBJECTS[number // 4 % 8]}" for number in range(PAIRS)]
    yardstick = Yardstick(pipe, make_inputs(prompts, steps=STEPS, batch_size=PAIRS))

    def lever(method: str, options: dict[str, Any]) -> Callable[[], AbstractContextManager[None]]:
        @contextmanager
        def thrown() -> Iterator[None]:
            getattr(pipe, method)(**options)
            yield
            pipe.turbo_undo()

        return thrown

    variants = {name: lever(*given) for name, given in LEVERS.items()} | wrong_variants(pipe)
    found = {}
    for name, variant in variants.items():
        with variant():
            found[name] = asdict(yardstick.measure(pipe).ours)
        print(f"{name:40} {found[name]['psnr_db']:6.1f} dB  latents {found[name]['latents']:.2g}", flush=True)
    data = {"environment": read_environment("cpu", measure=False), "pairs": PAIRS, "steps": STEPS, "distances": found}
    path.write_text(json.dumps(data, indent=2) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
