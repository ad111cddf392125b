"""Train the model: tokenizer and VAE, then UNet with text encoder.

    python train.py --data emoji_data --run emoji_run                    # both stages, one after the other
    python train.py --data emoji_data --run emoji_run --stage vae        # or each in a process of its own: the second
    python train.py --data emoji_data --run emoji_run --stage unet       # compiles while the first trains

Run with the repository root on PYTHONPATH: the attention processors are this package's own.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import platform
import random
import shutil
import time
from pathlib import Path

import diffusers
import torch
import transformers
from config import UNET_TRAINING, VAE_TRAINING, Training
from data import caption_table, caption_variants, load_images, load_items
from diffusers import AutoencoderKL, UNet2DConditionModel
from models import count, make_text_encoder, make_unet, train_tokenizer
from train_unet import train_unet
from train_vae import encode_all, psnr, train_vae
from transformers import CLIPTextModel, CLIPTokenizer

from diffusers_turbo.attention import SDPAAttnProcessor

BEGUN = time.perf_counter()


def versions(device: torch.device) -> dict[str, str]:
    """What the figures of a log depend on."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
    }


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


def vae_stage(args: argparse.Namespace, config: Training, device: torch.device) -> None:
    items = load_items(args.data)[: args.limit]
    images = load_images(args.data, items).to(device)
    if args.init_from:
        vae = AutoencoderKL.from_pretrained(args.init_from, subfolder="vae", dtype=torch.float32).to(device)
        vae.set_attn_processor(SDPAAttnProcessor())
        latents = encode_all(vae, images)
        log = {"init_from": args.init_from.name, "psnr_db_mean": round(psnr(vae, images, latents).mean().item(), 2)}
    else:
        vae, latents, log = train_vae(images, config)
    vae.save_pretrained(args.run / "vae")
    write_json(args.run / "vae_log.json", log | {"parameters": count(vae), "versions": versions(device)})
    # Written under another name first: the other stage waits for the file and must never read half of it.
    torch.save(latents.cpu(), args.run / "latents.part")
    (args.run / "latents.part").rename(args.run / "latents.pt")


def make_tokenizer(args: argparse.Namespace) -> CLIPTokenizer:
    if args.init_from:
        shutil.copytree(args.init_from / "tokenizer", args.run / "tokenizer", dirs_exist_ok=True)
        return CLIPTokenizer.from_pretrained(args.run / "tokenizer")
    rng = random.Random(1)
    texts = [text for item in load_items(args.data) for text in caption_variants(item, rng)]
    return train_tokenizer(texts, args.run / "tokenizer")


def unet_stage(args: argparse.Namespace, config: Training, device: torch.device) -> None:
    items = load_items(args.data)[: args.limit]
    captions = caption_table(make_tokenizer(args), items).to(device)
    if args.init_from:
        unet = UNet2DConditionModel.from_pretrained(args.init_from, subfolder="unet", dtype=torch.float32)
        text_encoder = CLIPTextModel.from_pretrained(args.init_from, subfolder="text_encoder", dtype=torch.float32)
        unet.set_attn_processor(SDPAAttnProcessor())
    else:
        unet, text_encoder = make_unet(), make_text_encoder()
    unet.to(device), text_encoder.to(device)
    shape = (len(items), unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    latents = torch.randn(shape, device=device)  # stand-ins while the step compiles

    def wait_for_latents() -> None:
        if args.rehearse:
            return
        path, patience = args.run / "latents.pt", time.perf_counter() + args.wait_seconds
        while not path.exists():
            if time.perf_counter() > patience:
                raise TimeoutError(f"{path} did not appear in {args.wait_seconds} s: see the log of the vae stage")
            time.sleep(0.2)
        latents.copy_(torch.load(path))

    deadline = BEGUN + (args.unet_until or math.inf)
    log = train_unet(unet, text_encoder, latents, captions, config, wait_for_latents, deadline)
    print("unet", {k: v for k, v in log.items() if k != "curve"}, flush=True)
    if args.rehearse:
        return
    unet.save_pretrained(args.run / "unet")
    text_encoder.save_pretrained(args.run / "text_encoder")
    parameters = {"parameters": count(unet), "text_encoder_parameters": count(text_encoder)}
    write_json(args.run / "unet_log.json", log | parameters | {"versions": versions(device)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder written by build_dataset.py")
    parser.add_argument("--run", type=Path, required=True, help="folder for weights and logs")
    parser.add_argument("--stage", choices=("vae", "unet", "all"), default="all")
    parser.add_argument("--vae-seconds", type=float, default=VAE_TRAINING.seconds)
    parser.add_argument("--unet-seconds", type=float, default=UNET_TRAINING.seconds)
    parser.add_argument("--unet-until", type=float, help="end the unet stage this many seconds after the process began")
    parser.add_argument("--wait-seconds", type=float, default=240, help="how long the unet stage waits for the latents")
    parser.add_argument("--unet-lr", type=float, default=UNET_TRAINING.peak_lr)
    parser.add_argument("--init-from", type=Path, help="continue from an exported pipeline folder; keeps its VAE")
    parser.add_argument("--rehearse", action="store_true", help="unet stage on random latents, saving nothing")
    parser.add_argument("--smoke", action="store_true", help="a few tiny steps, to see that everything runs")
    parser.add_argument("--limit", type=int, help="train on the first images only")
    args = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    args.run.mkdir(parents=True, exist_ok=True)
    smoke = {"batch": 4, "max_steps": 20} if args.smoke else {}
    if args.stage in ("vae", "all"):
        vae_stage(args, dataclasses.replace(VAE_TRAINING, seconds=args.vae_seconds, **smoke), device)
    if args.stage in ("unet", "all"):
        options = {"seconds": args.unet_seconds, "peak_lr": args.unet_lr}
        unet_stage(args, dataclasses.replace(UNET_TRAINING, **options, **smoke), device)


if __name__ == "__main__":
    main()
