"""Every switch as the tests throw it: how, how to take it off, and how to see that it had its effect."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from diffusers_turbo.actions.denoiser_slices import SlicedCall
from diffusers_turbo.actions.tiled_calls import ExactDecode
from diffusers_turbo.fused.layers import FusedGroupNorm, stand_in
from diffusers_turbo.schedulers.loop import LoopMethod

Pipe = Any


@dataclass(frozen=True)
class Switch:
    """One switch: method and arguments, its way off, and a check of its effect (called while it is on)."""

    on: str
    off: str
    effect: Callable[[Pipe], bool]
    slot: str
    arguments: dict[str, Any] = field(default_factory=dict)
    exact: bool = True
    name: str = ""

    def __str__(self) -> str:
        return self.name or self.on

    def throw(self, pipe: Pipe) -> None:
        """Switch it on."""
        getattr(pipe, self.on)(**self.arguments)

    def release(self, pipe: Pipe) -> None:
        """Switch it off."""
        getattr(pipe, self.off)()


def processors(name: str, **options: Any) -> Callable[[Pipe], bool]:
    """Check that every layer of UNet and VAE has the processor of this class with these options."""

    def check(pipe: Pipe) -> bool:
        found = [*pipe.unet.attn_processors.values(), *pipe.vae.attn_processors.values()]
        return all(type(p).__name__ == name and all(getattr(p, k) == v for k, v in options.items()) for p in found)

    return check


def _channels_last(pipe: Pipe) -> bool:
    return pipe.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


def _offloaded_hooks(pipe: Pipe) -> bool:
    return any("_hf_hook" in vars(m) or "_diffusers_hook" in vars(m) for m in pipe.unet.modules())


SWITCHES = [
    Switch("enable_naive_attention", "disable_naive_attention", processors("NaiveAttnProcessor"), "attention"),
    Switch("enable_sdpa", "disable_sdpa", processors("SDPAAttnProcessor", backend="auto"), "attention"),
    Switch(
        "enable_sdpa",
        "disable_sdpa",
        processors("SDPAAttnProcessor", backend="math"),
        "attention",
        {"backend": "math"},
        name="enable_sdpa-math",
    ),
    Switch(
        "enable_sdpa",
        "disable_sdpa",
        processors("SDPAAttnProcessor", backend="flash"),
        "attention",
        {"backend": "flash"},
        name="enable_sdpa-flash",
    ),
    Switch(
        "enable_attention_slicing",
        "disable_attention_slicing",
        processors("SlicedAttnProcessor", slice_size="auto"),
        "attention",
    ),
    Switch(
        "enable_attention_slicing",
        "disable_attention_slicing",
        processors("SlicedAttnProcessor", max_bytes=4096),
        "attention",
        {"slice_size": None, "max_bytes": 4096},
        name="enable_attention_slicing-max_bytes",
    ),
    Switch("enable_channels_last", "disable_channels_last", _channels_last, "layout"),
    Switch(
        "fuse_qkv_projections",
        "unfuse_qkv_projections",
        lambda pipe: pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.fused_projections,
        "projections",
    ),
    Switch(
        "enable_tf32",
        "disable_tf32",
        lambda pipe: any(lever.action == "enable_tf32" for lever in pipe.turbo_report().levers),
        "tf32",
        exact=False,
    ),
    Switch(
        "enable_half_precision",
        "disable_half_precision",
        lambda pipe: pipe.unet.dtype == torch.bfloat16,
        "precision",
        {"dtype": torch.bfloat16},
        exact=False,
    ),
    Switch("enable_vae_slicing", "disable_vae_slicing", lambda pipe: pipe.vae.use_slicing, "vae_slicing"),
    Switch(
        "enable_vae_tiling",
        "disable_vae_tiling",
        lambda pipe: pipe.vae.use_tiling and pipe.vae.tile_sample_min_size == 32,
        "vae_tiling",
        {"tile_size": 32},
        exact=False,
    ),
    Switch(
        "enable_vae_exact_tiling",
        "disable_vae_exact_tiling",
        lambda pipe: pipe.vae.use_tiling and isinstance(pipe.vae.tiled_decode, ExactDecode),
        "vae_tiling",
        {"tile_size": 32},
    ),
    Switch(
        "enable_fused_kernels",
        "disable_fused_kernels",
        lambda pipe: isinstance(stand_in(pipe.unet.mid_block.resnets[0].norm1), FusedGroupNorm),
        "kernels",
    ),
    Switch(
        "enable_denoiser_slicing",
        "disable_denoiser_slicing",
        lambda pipe: isinstance(vars(pipe.unet).get("_compiled_call_impl"), SlicedCall),
        "denoiser_slicing",
    ),
    Switch("enable_model_cpu_offload", "disable_offload", _offloaded_hooks, "offload", {"device": "cpu"}),
    Switch("enable_group_offload", "disable_offload", _offloaded_hooks, "offload", {"onload_device": "cpu"}),
    Switch(
        "enable_group_offload",
        "disable_offload",
        _offloaded_hooks,
        "offload",
        {"onload_device": "cpu", "offload_type": "leaf_level"},
        name="enable_group_offload-leaf",
    ),
    Switch(
        "enable_partial_offload",
        "disable_offload",
        _offloaded_hooks,
        "offload",
        {"resident_bytes": 700_000, "device": "cpu"},
    ),
    Switch(
        "enable_sync_free_loop",
        "disable_sync_free_loop",
        lambda pipe: isinstance(pipe.scheduler.step, LoopMethod),
        "scheduler",
    ),
    Switch(
        "enable_prompt_projections",
        "disable_prompt_projections",
        lambda pipe: "forward" in vars(pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k),
        "prompt",
    ),
    Switch(
        "enable_time_projections",
        "disable_time_projections",
        lambda pipe: "forward" in vars(pipe.unet.mid_block.resnets[0].time_emb_proj),
        "time",
    ),
    Switch(
        "enable_pointwise_matmul",
        "disable_pointwise_matmul",
        lambda pipe: "forward" in vars(pipe.vae.post_quant_conv),
        "pointwise",
    ),
    Switch(
        "compile_unet",
        "uncompile",
        lambda pipe: pipe.unet._compiled_call_impl is not None,
        "compile_unet",
        {"backend": "eager"},
    ),
    Switch(
        "compile_vae",
        "uncompile",
        lambda pipe: pipe.vae.decoder._compiled_call_impl is not None,
        "compile_vae",
        {"backend": "eager"},
    ),
    Switch(
        "enable_memory_fallback",
        "disable_memory_fallback",
        lambda pipe: "steps are taken when memory runs out: only exact ones" in str(pipe.turbo_report()),
        "memory_fallback",
    ),
    Switch("trace_unet", "untrace_unet", lambda pipe: "forward" in vars(pipe.unet), "trace"),
]
