"""Judge an exported pipeline: does the training image nearest to each generated one show what was asked for?

    python evaluate.py --data emoji_data --model ../emoji_sd --out emoji_run [--vae-sheet]

Writes eval.json, contact_sheet.png and, when asked, vae_sheet.png. Distances are Euclidean in the VAE's latents, over
all training images, so chance is 4 in 4,060 for the concept.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import random
import time
from pathlib import Path

import torch
from config import EVAL_PROMPTS, EVAL_SEED, EVAL_STEPS, GUIDANCE_SCALES, caption
from data import Item, load_images, load_items
from diffusers import AutoencoderKL, StableDiffusionPipeline
from sheets import contact_sheet, pair_sheet
from torch import Tensor
from train_vae import encode_all

CONTACT_LABELS = """\
red apple; pizza; hamburger; banana; strawberry; cat face; dog face; octopus; tropical fish; butterfly;
rocket; airplane; bicycle; sailboat; fire engine; guitar; camera; alarm clock; light bulb; umbrella with rain drops;
snowman; cactus; sunflower; evergreen tree; mushroom; grinning face with sweat; face with tears of joy; ghost; robot;
red heart; soccer ball; trophy; wrapped gift; balloon; jack-o-lantern; castle; volcano; rainbow; owl; penguin"""


def generate(pipe: StableDiffusionPipeline, prompts: list[str], scale: float, batch: int = 50) -> Tensor:
    """Images `[N, 3, 128, 128]` in 0..1, one CPU generator per prompt so that every device starts from equal noise."""
    images = []
    for first in range(0, len(prompts), batch):
        chunk = prompts[first : first + batch]
        generators = [torch.Generator("cpu").manual_seed(EVAL_SEED + first + i) for i in range(len(chunk))]
        options = {
            "num_inference_steps": EVAL_STEPS,
            "guidance_scale": scale,
            "generator": generators,
            "output_type": "pt",
        }
        images.append(pipe(chunk, **options).images.float())
    return torch.cat(images)


def score(
    pipe: StableDiffusionPipeline,
    judge: AutoencoderKL,
    items: list[Item],
    images: Tensor,
    latents: Tensor,
    scale: float,
    prompts: int,
) -> dict[str, object]:
    """Hits over the prompts drawn with the fixed seed, at one guidance scale."""
    asked = random.Random(EVAL_SEED).sample(range(len(items)), prompts)
    begun = time.perf_counter()
    made = generate(pipe, [items[i].prompt for i in asked], scale)
    seconds = time.perf_counter() - begun
    z = encode_all(judge, (made * 255).round().to(torch.uint8)).flatten(1)
    distances, nearest = torch.cdist(z[None], latents.flatten(1)[None])[0].min(dim=1)
    found = [items[i] for i in nearest.tolist()]
    wanted = [items[i] for i in asked]
    error = (made - images[asked].float() / 255).square().mean(dim=(1, 2, 3))
    return {
        "guidance_scale": scale,
        "concept_hits": sum(f.hexcode == w.hexcode for f, w in zip(found, wanted, strict=True)),
        "style_hits": sum(f.style == w.style for f, w in zip(found, wanted, strict=True)),
        "exact_hits": sum(f == w for f, w in zip(found, wanted, strict=True)),
        "psnr_to_training_image_db_median": round(-10 * error.log10().median().item(), 2),
        "distance_to_nearest_median": round(distances.median().item(), 2),
        "seconds": round(seconds, 2),
        "misses": [f"{w.prompt} -> {f.prompt}" for f, w in zip(found, wanted, strict=True) if f.hexcode != w.hexcode],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True, help="folder written by export.py")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--guidance", type=float, nargs="+", default=GUIDANCE_SCALES)
    parser.add_argument("--prompts", type=int, default=EVAL_PROMPTS, help="how many; fewer for a smoke run")
    parser.add_argument("--vae-sheet", action="store_true", help="also draw training images beside their decodings")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.float32
    pipe = StableDiffusionPipeline.from_pretrained(str(args.model), dtype=dtype).to(device)
    pipe.set_progress_bar_config(disable=True)
    items = load_items(args.data)
    images = load_images(args.data, items).to(device)
    judge = copy.deepcopy(pipe.vae).float()  # distances in fp32, whatever the pipeline runs in
    latents = encode_all(judge, images)

    results = []
    for scale in args.guidance:
        made = score(pipe, judge, items, images, latents, scale, args.prompts)
        results.append(made)
        print("eval", {k: v for k, v in made.items() if k != "misses"}, flush=True)
    best = max(results, key=lambda r: (r["concept_hits"], r["exact_hits"], r["psnr_to_training_image_db_median"]))
    report = {
        "prompts": args.prompts,
        "seed": EVAL_SEED,
        "steps": EVAL_STEPS,
        "scheduler": type(pipe.scheduler).__name__,
        "dtype": str(dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine() + " CPU",
        "training_images": len(items),
        "best": best,
        "all": results,
    }
    (args.out / "eval.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")

    labels = [label.strip() for label in CONTACT_LABELS.split(";")]
    styles = ("flat", "gradient", "3d", "noto")
    prompts = [caption(styles[(i + i // 8) % 4], label) for i, label in enumerate(labels)]
    contact_sheet(generate(pipe, prompts, best["guidance_scale"]), prompts).save(args.out / "contact_sheet.png")
    if args.vae_sheet:
        chosen = random.Random(EVAL_SEED).sample(range(len(items)), 32)
        decoded = pipe.vae.decode(latents[chosen].to(dtype)).sample.float().clamp(-1, 1) / 2 + 0.5
        pair_sheet(images[chosen].float() / 255, decoded.detach()).save(args.out / "vae_sheet.png")


if __name__ == "__main__":
    main()
