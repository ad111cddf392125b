"""Full-size pipelines on the meta device: real configs and real byte counts without a byte of weights."""

from __future__ import annotations

import functools
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

from diffusers_turbo.facts.pipeline import PipelineFacts, read_pipeline


def _vae(sample_size: int, force_upcast: bool) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        sample_size=sample_size,
        force_upcast=force_upcast,
    )


def _sd15_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)


def _sdxl_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=[1, 2, 10],
        attention_head_dim=[5, 10, 20],
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


def sd15(dtype: torch.dtype = torch.float16, device: str = "meta") -> StableDiffusionPipeline:
    """SD1.5 without its text encoder, as it was measured."""
    with torch.device(device):
        return StableDiffusionPipeline(
            unet=_sd15_unet().to(dtype),
            vae=_vae(512, False).to(dtype),
            text_encoder=None,
            tokenizer=None,
            scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


def sdxl(dtype: torch.dtype = torch.float16, device: str = "meta") -> StableDiffusionXLPipeline:
    """SDXL without its text encoders, as it was measured."""
    with torch.device(device):
        return StableDiffusionXLPipeline(
            unet=_sdxl_unet().to(dtype),
            vae=_vae(1024, True).to(dtype),
            text_encoder=None,
            text_encoder_2=None,
            tokenizer=None,
            tokenizer_2=None,
            scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        )


def pixart(dtype: torch.dtype = torch.bfloat16, device: str = "meta") -> PixArtAlphaPipeline:
    """PixArt-alpha at 1024, without its T5."""
    with torch.device(device):
        return PixArtAlphaPipeline(
            transformer=PixArtTransformer2DModel(sample_size=128, caption_channels=4096).to(dtype),
            vae=_vae(1024, True).to(dtype),
            text_encoder=None,
            tokenizer=None,
            scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        )


_MAKERS = {"sd15": sd15, "sdxl": sdxl, "pixart": pixart}
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@functools.cache
def facts_of(name: str, dtype: str = "float16") -> PipelineFacts:
    """The facts of one architecture; read once, since they are frozen."""
    make: Any = _MAKERS[name]
    return read_pipeline(make(_DTYPES[dtype]))
