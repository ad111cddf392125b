"""The components, made from config.py: tokenizer, VAE, text encoder, UNet."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from config import MAX_TOKENS, TEXT_CONFIG, UNET_CONFIG, VAE_CONFIG, VOCAB_SIZE
from diffusers import AutoencoderKL, UNet2DConditionModel
from tokenizers import pre_tokenizers, trainers
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffusers_turbo.attention import SDPAAttnProcessor


def count(module: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in module.parameters())


def train_tokenizer(prompts: list[str], folder: Path) -> CLIPTokenizer:
    """Learn a byte-pair vocabulary of `VOCAB_SIZE` from the prompts and save it in CLIP's own layout."""
    # CLIPTokenizer's normaliser and word splitter stay as they are: only the merges are learned.
    clip = CLIPTokenizer().backend_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        # Bytes that end a word are symbols of their own in CLIP; the trainer adds those that it meets, and the two
        # special tokens come last.
        vocab_size=VOCAB_SIZE - 2,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    clip.train_from_iterator(prompts, trainer)
    model = json.loads(clip.to_str())["model"]
    vocab = dict(sorted(model["vocab"].items(), key=lambda pair: pair[1]))
    if len(vocab) != VOCAB_SIZE - 2:
        raise ValueError(f"the captions gave {len(vocab)} tokens, {VOCAB_SIZE - 2} were asked for: add captions")
    vocab |= {"<|startoftext|>": VOCAB_SIZE - 2, "<|endoftext|>": VOCAB_SIZE - 1}
    merges = [" ".join(pair) for pair in model["merges"]]

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": MAX_TOKENS,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "do_lower_case": True,
        "add_prefix_space": False,
        "errors": "replace",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    return CLIPTokenizer.from_pretrained(folder)


def make_vae() -> AutoencoderKL:
    vae = AutoencoderKL(**VAE_CONFIG)
    vae.set_attn_processor(SDPAAttnProcessor())
    return vae


def make_unet() -> UNet2DConditionModel:
    unet = UNet2DConditionModel(**UNET_CONFIG)
    # Zero output at first, as in DDPM: the model starts at the best constant guess.
    nn.init.zeros_(unet.conv_out.weight)
    nn.init.zeros_(unet.conv_out.bias)
    unet.set_attn_processor(SDPAAttnProcessor())
    return unet


def make_text_encoder() -> CLIPTextModel:
    return CLIPTextModel(CLIPTextConfig(**TEXT_CONFIG))


@torch.no_grad()
def whiten(vae: AutoencoderKL, mean: torch.Tensor, std: torch.Tensor) -> None:
    """Fold `z -> (z - mean) / std` into the encoder's last and its inverse into the decoder's first 1x1 convolution.

    Pictures decode as before, but the latents now have zero mean and unit variance per channel. Stable Diffusion's
    pipelines can scale latents but not shift them, and a mean left in would leak through the schedule's last step
    (its terminal signal is not zero), tinting every picture.

    Args:
        mean, std: per channel of the latents, `[C]`.
    """
    channels = len(mean)
    to_moments, from_latents = vae.quant_conv, vae.post_quant_conv
    to_moments.weight[:channels] /= std.view(-1, 1, 1, 1)
    to_moments.bias[:channels] = (to_moments.bias[:channels] - mean) / std
    to_moments.bias[channels:] -= 2 * std.log()  # the second half are log variances
    from_latents.bias += from_latents.weight[:, :, 0, 0] @ mean
    from_latents.weight *= std.view(1, -1, 1, 1)
