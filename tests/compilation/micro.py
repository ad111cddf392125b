"""A pipeline whose parts are traced in a few seconds: one block a level, one level."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict

from diffusers_turbo import turbo
from tests import tiny


def unet() -> Any:
    """A UNet with one down and one up block, cross-attention in the first."""
    return tiny.unet(
        block_out_channels=(8,),
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("UpBlock2D",),
        mid_block_type=None,
    )


def decoder() -> Any:
    """A VAE's decoder of one block."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    return tiny.vae(block_out_channels=(8,), norm_num_groups=4, **blocks).decoder


def sd() -> Any:
    """A turbo pipeline with this UNet and the tests' usual other parts."""
    pipe = tiny.sd()
    torch.manual_seed(0)
    pipe.register_modules(unet=unet())
    return turbo(pipe)


def lora(seed: int, rank: int) -> dict[str, torch.Tensor]:
    """A LoRA for this UNet as a state dict, as `load_lora_weights` takes it; its weights change the picture visibly."""
    torch.manual_seed(seed)
    model = unet()
    model.add_adapter(LoraConfig(r=rank, lora_alpha=2 * rank + seed, target_modules=["to_q", "to_out.0"]))
    state = get_peft_model_state_dict(model)
    return {f"unet.{name}": torch.randn_like(tensor) for name, tensor in state.items()}
