"""What a callback may change between two steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig

TENSORS = ["latents", "prompt_embeds"]


def between_steps(alter: Callable[[Any, dict[str, Any]], None], *tensors: str) -> dict[str, Any]:
    """Arguments of a call that has the pipeline changed after its first step."""

    def callback(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == 0:
            alter(pipe, kwargs)
        return kwargs

    return {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": [*TENSORS, *tensors]}


def lora_on(pipe: Any, *targets: str, weight: float = 1.0) -> None:
    """Load a LoRA that changes the picture."""
    torch.manual_seed(0)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False))
    pipe.unet.set_adapters("default", weight)


def no_more_guidance(pipe: Any, kwargs: dict[str, Any]) -> None:
    """What diffusers' guide on callbacks does to save the negative half of the last steps."""
    pipe._guidance_scale = 0.0
    kwargs["prompt_embeds"] = kwargs["prompt_embeds"].chunk(2)[1]
