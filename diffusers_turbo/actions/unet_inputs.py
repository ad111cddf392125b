"""The UNet as a trace or an export sees it: tensors in, a tensor out, and inputs to show it with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..exported.inputs import ADDED

RELATIVE_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Largest |ours - eager| / |eager|. The mathematics are the same; what is left is the order of operations that a fuser
changes, a few units in the last place of each dtype over the depth of a UNet."""


class TensorsOnly(nn.Module):
    """The UNet with tensors in and a tensor out, which is all that a trace or an export can see."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, *added: Tensor) -> Tensor:
        """Run the UNet; `added` are SDXL's pooled text embeddings and time ids."""
        kwargs = {"added_cond_kwargs": dict(zip(ADDED, added, strict=True))} if added else {}
        output: Tensor = self.unet(sample, timestep, encoder_hidden_states, return_dict=False, **kwargs)[0]
        return output


def coarsest(unet: Any) -> int:
    """Return the multiple that a latent's sides need, so that no resolution is rounded on the way down."""
    return int(2 ** (len(unet.config.block_out_channels) - 1))


def example_inputs(
    unet: Any, height: int | None, width: int | None, batch_size: int, *, other: bool = False
) -> tuple[Tensor, ...]:
    """Make inputs for pictures of `height` x `width` pixels; with `other`, of a larger size and one row more.

    Returns sample `[2B, C, H/8, W/8]` (guidance doubles the batch), timestep `[]`, context `[2B, 77, D]`, and for SDXL
    pooled text embeddings `[2B, P]` and time ids `[2B, 6]`.
    """
    config, parameter = unet.config, next(unet.parameters())
    side = config.sample_size if isinstance(config.sample_size, int) else config.sample_size[0]
    height, width = (height or side * 8) // 8, (width or side * 8) // 8
    rows = 2 * batch_size
    if other:
        height, width, rows = height + coarsest(unet), width + 2 * coarsest(unet), rows + 1
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(parameter.device, parameter.dtype)

    context = config.cross_attention_dim
    width_of_context = context if isinstance(context, int) else context[0]
    inputs = [
        draw(rows, config.in_channels, height, width),
        torch.tensor(500, device=parameter.device),
        draw(rows, 77, width_of_context),
    ]
    if getattr(config, "addition_embed_type", None) == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs += [draw(rows, pooled), draw(rows, 6)]
    return tuple(inputs)


def relative_distance(unet: nn.Module, ours: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> float:
    """Return |ours - eager| / |eager| on these inputs."""
    with torch.no_grad():
        eager, output = TensorsOnly(unet)(*inputs).float(), ours(*inputs).float()
    return float((output - eager).norm() / eager.norm())
