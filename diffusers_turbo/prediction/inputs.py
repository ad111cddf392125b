"""What each known network is called with: meta tensors of the shapes its pipeline gives it.

A network that is not listed here, or is built to take more than is known here, is not run.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..facts.pipeline import PipelineFacts


class UnknownInputs(Exception):
    """A network's forward takes arguments that are not known here; the text says which."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """What is asked of the pipeline: `height` and `width` in pixels, `batch_size` pictures."""

    height: int
    width: int
    batch_size: int


@dataclass(frozen=True, kw_only=True)
class Call:
    """One denoising step: `samples` are what the denoiser sees, both halves of guidance counted."""

    pipe: Any
    facts: PipelineFacts
    picture: Picture
    dtype: torch.dtype

    @property
    def samples(self) -> int:
        """How many samples the denoiser sees."""
        return self.picture.batch_size * self.facts.guidance_copies

    @property
    def latent_size(self) -> tuple[int, int]:
        """Rows and columns of the latents."""
        scale = self.facts.vae_scale_factor
        return -(-self.picture.height // scale), -(-self.picture.width // scale)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Make a meta tensor."""
        return torch.empty(shape, dtype=dtype or self.dtype, device="meta")


def prompt_tokens(pipe: Any, name: str = "tokenizer") -> int:
    """Return how many tokens a prompt is padded to: what the call names, else what the tokenizer holds."""
    if name != "tokenizer" or not _has_tokenizer(pipe, name):
        named = _default(pipe, "max_sequence_length")
        if named is not None:
            return named
    length = getattr(getattr(pipe, name, None), "model_max_length", None)
    # tokenizers without a limit name an astronomic one
    if isinstance(length, int) and length < 100_000:
        return length
    return _default(pipe, "max_sequence_length") or 77


def _has_tokenizer(pipe: Any, name: str) -> bool:
    return getattr(pipe, name, None) is not None


def _default(pipe: Any, name: str) -> int | None:
    parameter = inspect.signature(type(pipe).__call__).parameters.get(name)
    found = None if parameter is None else parameter.default
    return found if isinstance(found, int) else None


def denoiser_inputs(module: Any, call: Call) -> dict[str, Any]:
    """Return what the denoiser is called with.

    Raises:
        UnknownInputs: it is of a class that is not known here, or takes more than is known.
    """
    name = type(module).__name__
    if name not in _DENOISERS:
        raise UnknownInputs(f"what a {name} is called with is not known")
    return _DENOISERS[name](module.config, call)


def _unet(config: Any, call: Call) -> dict[str, Any]:
    for option, known in (
        ("class_embed_type", (None,)),
        ("num_class_embeds", (None,)),
        ("encoder_hid_dim_type", (None,)),
        ("addition_embed_type", (None, "text_time")),
    ):
        if (found := getattr(config, option, None)) not in known:
            raise UnknownInputs(f"its UNet has {option}={found!r}, which takes inputs that are not known")
    inputs: dict[str, Any] = {
        "sample": call.empty(call.samples, config.in_channels, *call.latent_size),
        "timestep": call.empty(dtype=torch.int64),
        "encoder_hidden_states": call.empty(call.samples, prompt_tokens(call.pipe), _widest(config)),
    }
    if config.addition_embed_type == "text_time":
        ids = 6 if not _asks_for_score(call.pipe) else 5
        pooled = config.projection_class_embeddings_input_dim - ids * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {
            "text_embeds": call.empty(call.samples, pooled),
            "time_ids": call.empty(call.samples, ids),
        }
    if config.time_cond_proj_dim is not None:
        inputs["timestep_cond"] = call.empty(call.samples, config.time_cond_proj_dim)
    return inputs


def _asks_for_score(pipe: Any) -> bool:
    return bool(getattr(getattr(pipe, "config", None), "requires_aesthetics_score", False))


def _widest(config: Any) -> int:
    width = config.cross_attention_dim
    return int(max(width) if isinstance(width, (list, tuple)) else width)


def _sd3(config: Any, call: Call) -> dict[str, Any]:
    clip_tokens = getattr(call.pipe, "tokenizer_max_length", None) or 77
    tokens = clip_tokens + prompt_tokens(call.pipe, "tokenizer_3")
    return {
        "hidden_states": call.empty(call.samples, config.in_channels, *call.latent_size),
        "encoder_hidden_states": call.empty(call.samples, tokens, config.joint_attention_dim),
        "pooled_projections": call.empty(call.samples, config.pooled_projection_dim),
        "timestep": call.empty(call.samples),
    }


def _flux(config: Any, call: Call) -> dict[str, Any]:
    rows, columns = call.latent_size
    tokens, text = (rows // 2) * (columns // 2), prompt_tokens(call.pipe, "tokenizer_2")
    inputs = {
        "hidden_states": call.empty(call.samples, tokens, config.in_channels),
        "encoder_hidden_states": call.empty(call.samples, text, config.joint_attention_dim),
        "pooled_projections": call.empty(call.samples, config.pooled_projection_dim),
        "timestep": call.empty(call.samples),
        "img_ids": call.empty(tokens, 3),
        "txt_ids": call.empty(text, 3),
    }
    if config.guidance_embeds:
        inputs["guidance"] = call.empty(call.samples, dtype=torch.float32)
    return inputs


def _pixart(config: Any, call: Call) -> dict[str, Any]:
    tokens = _default(call.pipe, "max_sequence_length") or 120
    sized = config.use_additional_conditions
    # as the class decides where the config leaves it open
    sized = config.sample_size == 128 if sized is None else sized
    return {
        "hidden_states": call.empty(call.samples, config.in_channels, *call.latent_size),
        "encoder_hidden_states": call.empty(call.samples, tokens, config.caption_channels),
        "encoder_attention_mask": call.empty(call.samples, tokens),
        "timestep": call.empty(call.samples),
        "added_cond_kwargs": {
            "resolution": call.empty(call.samples, 2) if sized else None,
            "aspect_ratio": call.empty(call.samples, 1) if sized else None,
        },
    }


_DENOISERS: dict[str, Callable[[Any, Call], dict[str, Any]]] = {
    "UNet2DConditionModel": _unet,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
    "PixArtTransformer2DModel": _pixart,
}

CONTROLNETS = ("ControlNetModel",)
"""ControlNets whose residuals go into a UNet."""


def controlnet_inputs(module: Any, unet_inputs: dict[str, Any], call: Call) -> dict[str, Any]:
    """Return what a ControlNet is called with beside a UNet.

    Raises:
        UnknownInputs: it is of a class that is not known here.
    """
    name = type(module).__name__
    if name not in CONTROLNETS:
        raise UnknownInputs(f"what a {name} is called with is not known")
    inputs: dict[str, Any] = {
        key: unet_inputs[key]
        for key in ("timestep", "encoder_hidden_states", "added_cond_kwargs")
        if key in unet_inputs
    }
    sample = unet_inputs["sample"][:, : module.config.in_channels]  # inpainting adds a mask for the UNet alone
    channels = module.config.conditioning_channels
    hint = call.empty(call.samples, channels, call.picture.height, call.picture.width)
    return {"sample": sample, "controlnet_cond": hint, **inputs}


TEXT_ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel")
"""Text encoders that are called with the ids of tokens."""


def text_inputs(module: Any, name: str, pipe: Any, prompts: int) -> dict[str, Any]:
    """Return what the text encoder `name` is called with.

    Raises:
        UnknownInputs: it is of a class that is not known here.
    """
    kind = type(module).__name__
    if kind not in TEXT_ENCODERS:
        raise UnknownInputs(f"what a {kind} is called with is not known")
    tokens = prompt_tokens(pipe, name.replace("text_encoder", "tokenizer"))
    if kind.startswith("CLIP"):
        tokens = min(tokens, module.config.max_position_embeddings)
    ids = torch.empty(prompts, tokens, dtype=torch.int64, device="meta")
    return {"input_ids": ids, "output_hidden_states": kind.startswith("CLIP")}


VAES = ("AutoencoderKL", "AutoencoderTiny")
"""Autoencoders that take pictures `[B, 3, H, W]` and latents `[B, C, h, w]`."""


def takes_pictures(pipe: Any) -> bool:
    """Whether a call of the pipeline encodes pictures: image to image, inpainting, editing."""
    prepare = getattr(type(pipe), "prepare_latents", None)
    given = inspect.signature(prepare).parameters if prepare is not None else {}
    return "image" in given or any(hasattr(pipe, name) for name in ("_encode_vae_image", "prepare_image_latents"))
