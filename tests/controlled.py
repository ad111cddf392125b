"""Tiny ControlNet pipelines whose ControlNets do control."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

from diffusers_turbo.bench.tasks import task_inputs
from tests import tiny


def controlled(several: bool = False, cls: Any = StableDiffusionControlNetPipeline) -> Any:
    """A Stable Diffusion pipeline with one ControlNet or two."""
    base = tiny.sd()
    torch.manual_seed(1)
    nets = [_net(base.unet) for _ in range(1 + several)]
    parts = {name: part for name, part in base.components.items() if name != "requires_safety_checker"}
    pipe = cls(**parts, controlnet=nets if several else nets[0], requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _net(unet: Any) -> ControlNetModel:
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8, 8, 8)).eval()
    with torch.no_grad():
        for block in net.controlnet_down_blocks:  # made of zeros, which would control nothing
            block.weight.normal_()
    return net


def controlled_picture(pipe: Any, **arguments: Any) -> torch.Tensor:
    """Make a picture of 32 x 32 pixels under a control image."""
    image = task_inputs("img2img", 32, 32, 1)["image"][0]
    nets = getattr(pipe.controlnet, "nets", [pipe.controlnet])
    control = [image] * len(nets) if len(nets) > 1 else image
    return tiny.picture(pipe, **{"steps": 3, "image": control, "height": 32, "width": 32, **arguments})
