"""channels_last: convolution weights laid out as cuDNN's and oneDNN's fast kernels read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import NotSupportedError, explain_failure
from ..planning.options import ChannelsLast
from .components import modules_of, require_plain_weights
from .undo import Journal, journaling


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
    require_plain_weights(pipe, "enable_channels_last()")
    changed = 0
    with journaling() as journal:
        for component, root in modules_of(pipe).items():
            for path, owner in root.named_modules():
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
    return journal


def channels_last_strides(shape: torch.Size) -> tuple[int, ...]:
    """Return the strides of a dense channels-last tensor of shape `[O, I, H, W]`."""
    _, inputs, height, width = shape
    return (inputs * height * width, 1, width * inputs, inputs)


def restrided(data: torch.Tensor, stride: tuple[int, ...]) -> torch.Tensor:
    """Return the same values with other strides."""
    return torch.empty_strided(data.shape, stride, dtype=data.dtype, device=data.device).copy_(data)
