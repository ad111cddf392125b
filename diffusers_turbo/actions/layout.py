"""channels_last: convolution weights laid out as cuDNN's and oneDNN's fast kernels read them.

Activations follow from the first convolution on, but for one place: diffusers' `Transformer2DModel` copies its picture
to the other layout, and the next convolution copies it back. Its last part is replaced by one that leaves it so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import NotSupportedError, explain_failure
from ..planning.options import ChannelsLast
from .components import modules_of, require_plain_weights
from .undo import Journal, journaling

OUTPUT = "_get_output_for_continuous_inputs"
"""What diffusers calls the last part of a `Transformer2DModel`'s forward."""


@dataclass(eq=False)
class PictureOutput:
    """Stands in for the last part of a `Transformer2DModel`: its tokens are a channels-last picture as they lie."""

    model: Any

    def __call__(
        self,
        hidden_states: torch.Tensor,
        residual: torch.Tensor,
        batch_size: int,
        height: int,
        width: int,
        inner_dim: int,
    ) -> torch.Tensor:
        """Project tokens `[B, H * W, D]` and add the residual `[B, C, H, W]`; the arguments are the host's."""
        project = self.model.proj_out
        if self.model.use_linear_projection:
            picture = _picture(project(hidden_states), batch_size, height, width)
        else:
            picture = project(_picture(hidden_states, batch_size, height, width))
        result: torch.Tensor = picture + residual
        return result


def _picture(tokens: torch.Tensor, batch_size: int, height: int, width: int) -> torch.Tensor:
    # the host's numbers, which a trace sees as inputs; len() would be baked in. No -1 either, which a
    # compiler would have to work out of symbolic ones.
    return tokens.view(batch_size, height, width, tokens.shape[-1]).movedim(-1, 1)


@dataclass
class StrideChange:
    """One 4-D parameter `[O, I, H, W]` whose strides were changed; the values never were."""

    owner: nn.Module
    name: str
    before: tuple[int, ...]
    after: tuple[int, ...]
    label: str

    def revert(self) -> str | None:
        """Lay the current values out with the original strides."""
        tensor = self.owner._parameters.get(self.name)
        if tensor is None:
            return f"{self.label} is gone"
        if tensor.stride() != self.after:
            return None if tensor.stride() == self.before else f"{self.label} was laid out anew meanwhile"
        tensor.data = restrided(tensor.data, self.before)
        return None


def apply(pipe: Any, options: ChannelsLast) -> Journal:
    """Exact: lay every 4-D weight out channels-last; activations follow from the first convolution on."""
    from diffusers import Transformer2DModel

    require_plain_weights(pipe, "enable_channels_last()")
    changed = kept = 0
    with journaling() as journal:
        for component, root in modules_of(pipe).items():
            for path, owner in root.named_modules():
                if type(owner) is Transformer2DModel and owner.is_input_continuous and OUTPUT not in vars(owner):
                    journal.set_attribute(owner, OUTPUT, PictureOutput(owner))
                    kept += 1
                for name, tensor in owner._parameters.items():
                    if tensor is None or tensor.dim() != 4:
                        continue
                    before = tensor.stride()
                    tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
                    after = channels_last_strides(tensor.shape)
                    if tensor.stride() != after:
                        # Where a side is 1 several strides describe the same layout, and `contiguous` keeps what it
                        # finds; convolutions look at the strides to choose their kernels.
                        tensor.data = restrided(tensor.data, after)
                    changed += before != after
                    journal.add(StrideChange(owner, name, before, after, f"{component}.{path}.{name}"))
        if not changed:
            raise NotSupportedError(
                explain_failure(
                    "enable_channels_last()",
                    f"no 4-D weight to lay out anew in {type(pipe).__name__}",
                    "a model with 2-D convolutions that is not channels-last already",
                    "leave this switch off",
                )
            )
        journal.note(f"{changed} convolution weights laid out channels-last")
        if kept:
            journal.note(f"{kept} transformers leave their pictures in that layout")
    return journal


def channels_last_strides(shape: torch.Size) -> tuple[int, ...]:
    """Return the strides of a dense channels-last tensor of shape `[O, I, H, W]`."""
    _, inputs, height, width = shape
    return (inputs * height * width, 1, width * inputs, inputs)


def restrided(data: torch.Tensor, stride: tuple[int, ...]) -> torch.Tensor:
    """Return the same values with other strides."""
    return torch.empty_strided(data.shape, stride, dtype=data.dtype, device=data.device).copy_(data)
