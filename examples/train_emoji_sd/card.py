# ruff: noqa: E501 (the card is Markdown, wrapped as it will read)
"""Write the model card from the logs, so that no figure in it is typed by hand.

    python card.py --model ../emoji_sd --log train_log.json
    python card.py --model ../emoji_sd --log train_log.json --merge emoji_run/vae_log.json emoji_run/unet_log.json \\
        emoji_run/eval.json emoji_run/cpu.json           # first make train_log.json of what a run has left
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

CARD = """\
---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---
<!-- Written by examples/train_emoji_sd/card.py from train_log.json. Change the script, not this file. -->

# emoji_sd

A real Stable Diffusion pipeline of {size_mib:.1f} MiB: 128 px emoji from text, trained from nothing on {images:,} pictures in
{total_min:.0f} minutes of one GPU. It exists so that examples, tests and benchmarks of diffusers_turbo have a model with meaningful
pictures that needs no download.

```python
from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained("examples/emoji_sd")
pipe("a 3d emoji of red apple", num_inference_steps={steps}, guidance_scale={scale:g}).images[0]
```

![forty prompts](../../docs/emoji/contact_sheet.png)

Prompts look like `a {{flat|gradient|3d|noto}} emoji of {{label}}`, labels as Unicode names them (`red apple`, `alarm clock`), with
tags after a comma if you like.

## What it is not

It has seen about a thousand things, four pictures each, hundreds of times: **it memorises and does not compose**. A prompt
outside its list gives a mixture of neighbours. No people, flags, symbols or text. The styles `gradient` and `3d` are nearly
the same drawings. There is no safety checker, and nothing in the training set to check for.

## Figures

| part | parameters |
|---|---|
| UNet | {unet_m:.2f} M |
| VAE, 128 px to {latent} latents | {vae_m:.2f} M |
| text encoder (CLIP's architecture, 2,048 tokens) | {text_m:.2f} M |

VAE: {vae_psnr:.1f} dB PSNR mean over the training images, {vae_p10:.1f} dB for the worst tenth. Latents are whitened in the VAE's own
weights, so `scaling_factor` is 1.

For {prompts} prompts drawn with a fixed seed ({steps} {scheduler} steps, {eval_dtype}), the training image nearest to the generated one
in the VAE's latents, among all {images:,}:

| guidance scale | shows the concept | has the style | both: the very image | PSNR to that image, median |
|---|---|---|---|---|
{rows}

On a CPU with {cpu_threads} threads, {cpu_dtype}, {steps} steps with guidance: {cpu_s:.1f} s.

Training on {device}: VAE {vae_s:.0f} s ({vae_epochs:,} epochs, {vae_rate:,} images/s), then UNet and text encoder {unet_s:.0f} s
({unet_steps:,} steps of {unet_batch}, {unet_epochs:,} epochs, {unet_rate:,} latents/s), after {unet_prepare:.0f} s of compilation beside the VAE's
training. torch {torch}, diffusers {diffusers}. The curve and everything else: `examples/train_emoji_sd/train_log.json`.

Weights are fp16; DDIM is saved, and PNDM, Euler, DPM-Solver++, UniPC and LCM schedulers run on it too (LCM without the
distillation that makes it good at few steps).

## Licence

Apache-2.0; the pictures it learned from are Microsoft's Fluent emoji (MIT) and Google's Noto emoji (Apache-2.0), captions from
emojibase (MIT). Their notices are in [NOTICE](NOTICE).
"""


def merge(paths: list[Path]) -> dict[str, object]:
    """One log of `vae_log.json`, `unet_log.json`, `eval.json` and `cpu.json`, keyed by the part of the name before '_'."""
    return {path.stem.removesuffix("_log"): json.loads(path.read_text()) for path in paths}


def card(log: dict, size_bytes: int) -> str:
    vae, unet, judged, cpu = log["vae"], log["unet"], log["eval"], log["cpu"]
    rows = [
        f"| {r['guidance_scale']:g} | {r['concept_hits']} of {judged['prompts']} | {r['style_hits']} | {r['exact_hits']} | "
        f"{r['psnr_to_training_image_db_median']:.1f} dB |"
        for r in judged["all"]
    ]
    return CARD.format(
        size_mib=size_bytes / 2**20,
        images=judged["training_images"],
        total_min=(vae["prepare_s"] + vae["train_s"] + unet["train_s"]) / 60,
        steps=judged["steps"],
        scale=judged["best"]["guidance_scale"],
        prompts=judged["prompts"],
        scheduler=judged["scheduler"].removesuffix("Scheduler"),
        eval_dtype=judged["dtype"],
        latent=f"16x16x{len(vae['latent_std'])}",
        unet_m=unet["parameters"] / 1e6,
        vae_m=vae["parameters"] / 1e6,
        text_m=unet["text_encoder_parameters"] / 1e6,
        vae_psnr=vae["psnr_db_mean"],
        vae_p10=vae["psnr_db_p10"],
        rows="\n".join(rows),
        cpu_threads=cpu["threads"],
        cpu_dtype=cpu["dtype"],
        cpu_s=cpu["seconds_median"],
        device=unet["versions"]["device"],
        torch=unet["versions"]["torch"],
        diffusers=unet["versions"]["diffusers"],
        vae_s=vae["train_s"],
        vae_epochs=vae["epochs"],
        vae_rate=vae["images_per_s"],
        unet_s=unet["train_s"],
        unet_steps=unet["steps"],
        unet_batch=unet["batch"],
        unet_epochs=unet["epochs"],
        unet_rate=unet["images_per_s"],
        unet_prepare=unet["prepare_s"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--merge", type=Path, nargs="+")
    args = parser.parse_args()
    if args.merge:
        args.log.write_text(json.dumps(merge(args.merge), indent=1, ensure_ascii=False) + "\n")
    log = json.loads(args.log.read_text())
    size_bytes = sum(p.stat().st_size for p in args.model.rglob("*") if p.is_file() and p.name != "README.md")
    (args.model / "README.md").write_text(card(log, size_bytes))


if __name__ == "__main__":
    main()
