"""Assemble the trained parts into a StableDiffusionPipeline folder: fp16 safetensors under the default names.

python export.py --run emoji_run --out ../emoji_sd
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from config import SCHEDULER_CONFIG
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json")


def export(run: Path, out: Path) -> None:
    """Write `out`; whatever else lies there (card, notice) stays."""
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(run / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(run / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(run / "tokenizer"),
        unet=UNet2DConditionModel.from_pretrained(run / "unet"),
        scheduler=DDIMScheduler(**SCHEDULER_CONFIG),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    for part in (pipe.vae, pipe.text_encoder, pipe.unet):
        part.half()
    pipe.save_pretrained(out, safe_serialization=True)
    # vocab.json and merges.txt load in every version of transformers, tokenizer.json only in recent ones.
    shutil.rmtree(out / "tokenizer")
    (out / "tokenizer").mkdir()
    for name in TOKENIZER_FILES:
        shutil.copy(run / "tokenizer" / name, out / "tokenizer" / name)
    for path in out.rglob("*config.json"):
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)  # where the parts happened to lie during training
        if path.parent.name == "text_encoder":
            # transformers 5 loads in this dtype when the caller names none, diffusers in float32: they must agree.
            config["dtype"] = "float32"
        path.write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder written by train.py")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    export(args.run, args.out)
    size = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file())
    print(f"{args.out}: {size / 2**20:.2f} MiB")


if __name__ == "__main__":
    main()
