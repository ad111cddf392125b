"""Try an exported folder as a user would: offline, on the CPU, under every common scheduler; write cpu.json.

python check_export.py --model ../emoji_sd --out cpu.json [--threads 2]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported

import diffusers
import torch
from config import EVAL_SEED, EVAL_STEPS, IMAGE_SIZE
from diffusers import StableDiffusionPipeline

SCHEDULERS = (
    "DDIMScheduler",
    "PNDMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "LCMScheduler",
)
PROMPT = "a 3d emoji of red apple"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe = StableDiffusionPipeline.from_pretrained(str(args.model))
    pipe.set_progress_bar_config(disable=True)

    def draw() -> torch.Tensor:
        generator = torch.Generator("cpu").manual_seed(EVAL_SEED)
        options = {
            "num_inference_steps": EVAL_STEPS,
            "guidance_scale": 4.0,
            "generator": generator,
            "output_type": "pt",
        }
        image = pipe(PROMPT, **options).images
        if image.shape != (1, 3, IMAGE_SIZE, IMAGE_SIZE) or not image.isfinite().all():
            raise ValueError(
                f"{type(pipe.scheduler).__name__} gave {tuple(image.shape)}, or values that are not finite"
            )
        return image

    seconds = []
    for _ in range(args.repeat + 1):
        begun = time.perf_counter()
        reference = draw()
        seconds.append(time.perf_counter() - begun)
    distances = {}
    for name in SCHEDULERS:
        pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
        error = (draw() - reference).square().mean()
        distances[name] = None if error == 0 else round(-10 * error.log10().item(), 1)
    report = {
        "threads": args.threads,
        "steps": EVAL_STEPS,
        "dtype": str(pipe.unet.dtype).removeprefix("torch."),
        "seconds_first": round(seconds[0], 2),
        "seconds_median": round(statistics.median(seconds[1:]), 2),
        "psnr_to_ddim_db": distances,
        "torch": torch.__version__,
    }
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(report)


if __name__ == "__main__":
    main()
