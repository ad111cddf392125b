"""Tiny pipelines with random weights, real in every part: made from config in well under a second, no download."""

from __future__ import annotations

import string
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

TOKENS = 16
CONTEXT = 32


def tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer of the 26 letters."""
    letters = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    vocabulary = {token: index for index, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=TOKENS)


def text_encoder(cls: type = CLIPTextModel) -> Any:
    """A text encoder of two layers."""
    config = CLIPTextConfig(
        vocab_size=64,
        hidden_size=CONTEXT,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
        max_position_embeddings=TOKENS,
        projection_dim=CONTEXT,
        bos_token_id=52,
        eos_token_id=53,
        pad_token_id=53,
    )
    return cls(config).eval()


def vae(**changes: Any) -> AutoencoderKL:
    """An autoencoder of 8 pixels a latent."""
    blocks = 4
    config = {
        "block_out_channels": (16, 16, 16, 32),
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ("DownEncoderBlock2D",) * blocks,
        "up_block_types": ("UpDecoderBlock2D",) * blocks,
        "latent_channels": 4,
        "norm_num_groups": 8,
        "sample_size": 64,
        "layers_per_block": 1,
    }
    return AutoencoderKL(**config | changes).eval()


def unet(**changes: Any) -> UNet2DConditionModel:
    """A UNet of two levels with self- and cross-attention."""
    config = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": CONTEXT,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**config | changes).eval()


def sd(**vae_changes: Any) -> StableDiffusionPipeline:
    """A Stable Diffusion 1.x pipeline of 64 x 64 pixels."""
    torch.manual_seed(0)
    pipe = StableDiffusionPipeline(
        vae=vae(**vae_changes),
        text_encoder=text_encoder(),
        tokenizer=tokenizer(),
        unet=unet(),
        scheduler=DDIMScheduler(
            clip_sample=False, set_alpha_to_one=False, beta_schedule="scaled_linear", steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sdxl() -> StableDiffusionXLPipeline:
    """A Stable Diffusion XL pipeline of 64 x 64 pixels whose VAE asks for float32 decoding."""
    torch.manual_seed(0)
    pipe = StableDiffusionXLPipeline(
        vae=vae(force_upcast=True),
        text_encoder=text_encoder(),
        text_encoder_2=text_encoder(CLIPTextModelWithProjection),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        unet=unet(
            cross_attention_dim=2 * CONTEXT,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=CONTEXT + 6 * 8,
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
        ),
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear", steps_offset=1),
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pixart() -> PixArtAlphaPipeline:
    """A PixArt pipeline (transformer denoiser) without its T5 encoder: pass prompt embeddings."""
    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_channels=CONTEXT,
        cross_attention_dim=32,
        in_channels=4,
        out_channels=8,
    ).eval()
    pipe = PixArtAlphaPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae(),
        transformer=transformer,
        scheduler=DDIMScheduler(clip_sample=False),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(pipe: Any, *, seed: int = 0, batch: int = 1, steps: int = 2, **changes: Any) -> torch.Tensor:
    """Make pictures `[B, 3, H, W]` from fixed latents (the same numbers for every dtype and device)."""
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    generator = torch.Generator().manual_seed(seed)
    side = denoiser.config.sample_size
    height, width = (changes.get(name, 8 * side) // 8 for name in ("height", "width"))
    latents = torch.randn(batch, 4, height, width, generator=generator)
    arguments: dict[str, Any] = {
        "latents": latents.to(pipe._execution_device, denoiser.dtype),
        "num_inference_steps": steps,
        "output_type": "pt",
        **changes,
    }
    if isinstance(pipe, PixArtAlphaPipeline):
        embeddings = torch.randn(2, batch, TOKENS, CONTEXT, generator=generator).to(
            pipe._execution_device, denoiser.dtype
        )
        mask = torch.ones(batch, TOKENS, device=embeddings.device)
        arguments |= {
            "prompt_embeds": embeddings[0],
            "prompt_attention_mask": mask,
            "negative_prompt_embeds": embeddings[1],
            "negative_prompt_attention_mask": mask,
            "negative_prompt": None,
            "use_resolution_binning": False,
        }
    else:
        arguments |= {"prompt": ["red cat"] * batch}
    return pipe(**arguments).images.detach().float().cpu()
