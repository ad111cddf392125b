"""Every architecture in miniature: the same classes, wiring, scheduler and tokenizers, with a few thin layers."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch

from diffusers_turbo.bench.architectures import Architecture, assemble, find
from diffusers_turbo.bench.parts import Part

TEXT = 32
SIDE = 64

_CLIP = {
    "hidden_size": TEXT,
    "intermediate_size": TEXT,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": TEXT,
}
_T5 = {"d_model": TEXT, "d_kv": 16, "d_ff": TEXT, "num_layers": 2, "num_heads": 2}
_VAE = {"block_out_channels": (32,) * 4, "layers_per_block": 1}
_HEADS = {"attention_head_dim": 16, "num_attention_heads": 2}
_THIN = {
    "sd15": {"block_out_channels": (32,) * 4, "cross_attention_dim": TEXT, "attention_head_dim": 2},
    "sd21": {"block_out_channels": (32,) * 4, "cross_attention_dim": TEXT, "attention_head_dim": (2,) * 4},
    "sdxl": {
        "block_out_channels": (32,) * 3,
        "cross_attention_dim": 2 * TEXT,
        "attention_head_dim": (2,) * 3,
        "transformer_layers_per_block": 1,
        "projection_class_embeddings_input_dim": TEXT + 6 * 256,
    },
    "sd3": {
        **_HEADS,
        "num_layers": 2,
        "caption_projection_dim": TEXT,
        "joint_attention_dim": 2 * TEXT,
        "pooled_projection_dim": 2 * TEXT,
    },
    "flux": {
        **_HEADS,
        "num_layers": 1,
        "num_single_layers": 1,
        "axes_dims_rope": (4, 6, 6),
        "joint_attention_dim": TEXT,
        "pooled_projection_dim": TEXT,
    },
    # its width is cut in three for timestep, size and aspect ratio
    "pixart": {
        "attention_head_dim": 16,
        "num_attention_heads": 3,
        "num_layers": 2,
        "cross_attention_dim": 48,
        "caption_channels": TEXT,
    },
}
_THIN["sdxl-fp16-vae"] = _THIN["sdxl"]


def shrunk(name: str) -> Architecture:
    """An architecture with thin layers."""
    full = find(name)
    models = {
        attribute: _with(part, _VAE if attribute == "vae" else _THIN[name]) for attribute, part in full.models.items()
    }
    encoders = {
        attribute: part and _with(part, _T5 if part.class_name.startswith("T5") else _CLIP)
        for attribute, part in full.text_encoders.items()
    }
    return dataclasses.replace(full, models=models, text_encoders=encoders)


def build(
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
    text_encoders: bool = True,
) -> Any:
    """A pipeline of thin layers."""
    return assemble(shrunk(name), dtype=dtype, device=device, seed=seed, text_encoders=text_encoders)


@functools.cache
def ready(name: str) -> Any:
    """The float32 pipeline, built once for all tests that leave it as it is."""
    return build(name)


def picture(pipe: Any, prompt: str = "A photo", **arguments: Any) -> torch.Tensor:
    """Pictures `[B, 3, H, W]` of two steps from fixed noise."""
    generator = torch.Generator().manual_seed(0)
    if type(pipe).__name__ == "PixArtAlphaPipeline":
        # as they are: neither scaled to a known size nor cleaned, for which it wants another package
        arguments |= {"use_resolution_binning": False, "clean_caption": False}
    sizes = {} if "image" in arguments else {"height": SIDE, "width": SIDE}
    made = pipe(prompt, generator=generator, **({"num_inference_steps": 2, "output_type": "pt"} | sizes | arguments))
    return made.images.float()


def _with(part: Part, changes: dict[str, Any]) -> Part:
    return dataclasses.replace(part, config={**part.config, **changes})
