"""diffusers' `Upsample2D` in its plain case: its convolution computed from the small picture."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.registry import KERNELS
from ..kernels.upsample_conv import upsample_conv_launch
from .layers import FusedForward, Variant, channels_last, has_plain_weights, is_offloaded, unwatched

LEAST_POSITIONS = 1024
"""Positions of a small picture that is worth it, 32 x 32. Folding the weights moves 50 bytes for each pair of channels
(9 taps read, 16 written, 16-bit), whatever the picture; each position is spared 20 multiplications of the pair.
Measured on an H100 with guidance, 1280 channels: 16 x 16 takes 117 us where stock takes 115, 32 x 32 279 and 413
(docs/benchmarks/candidates-h100.json). The batch plays no part, so that a picture's bits do not depend on how many are
made beside it."""


@dataclass(eq=False)
class FusedUpsample(FusedForward):
    """`Upsample2D`, its convolution included; `kind` is its class, which others may exchange meanwhile."""

    kernel = "upsample_conv"
    instead = "as upsampling and a convolution after it"

    kind: type = nn.Module

    @property
    def conv(self) -> Any:
        """The convolution, under the name that the host calls it by."""
        return self.module.conv if self.module.name == "conv" else self.module.Conv2d_0

    def __call__(self, hidden_states: Tensor, output_size: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        """Double `[B, C, H, W]` and convolve it; the arguments are the host's."""
        conv, x = self.conv, hidden_states
        refused = self._unusual(conv, x, output_size, bool(args or kwargs))
        if not refused:
            if channels_last(conv.weight):  # the convolution would lay out the large picture anew
                x = x.contiguous(memory_format=torch.channels_last)
            refused = KERNELS[self.kernel].misfits(x, conv.weight, conv.bias)
        self.refused = tuple(refused)
        if refused:
            result: Tensor = type(self.module).forward(self.module, hidden_states, output_size, *args, **kwargs)
        else:
            result = KERNELS[self.kernel].run(x, conv.weight, conv.bias)
        return result

    def _unusual(self, conv: Any, x: Tensor, output_size: Any, more: bool) -> list[str]:
        """Why the host's own forward must run, but for what the kernel says of the tensors."""
        if not self.runs_on(x):
            return [f"it does not take {x.dtype} on {x.device.type} here"]
        if type(self.module) is not self.kind:
            return [f"it became a {type(self.module).__name__}"]
        if not _is_plain(conv):
            return [f"its convolution is not a plain 3x3 nn.Conv2d ({type(conv).__name__})"]
        if not has_plain_weights(conv):
            return [f"its weight is a {type(conv.weight).__name__}"]
        if torch.is_autocast_enabled(x.device.type):
            return ["autocast chooses the dtype of the convolution"]
        if output_size is not None and torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            return ["a trace would keep that the size is twice the input's"]
        height, width = x.shape[-2:]
        if more or (output_size is not None and tuple(output_size) != (2 * height, 2 * width)):
            return ["it is asked for another size than twice its input's, or given more than that"]
        if height * width < LEAST_POSITIONS:
            return [f"on fewer than {LEAST_POSITIONS} positions it would cost more than it spares"]
        return []

    def _weight(self) -> Tensor | None:
        found: Tensor | None = getattr(self.conv, "weight", None)
        return found

    def _variants(self, weight: Tensor) -> Iterator[Variant]:
        if not _is_plain(self.conv):
            return
        outputs, inputs = (_few(channels) for channels in weight.shape[:2])
        x, small = (weight.new_zeros(*shape, inputs).movedim(-1, 1) for shape in ((1, 1, 1), (outputs, 3, 3)))
        bias = None if self.conv.bias is None else self.conv.bias.new_zeros(outputs)
        cuts = ((upsample_conv_launch(channels), channels % 16 == 0) for channels in (inputs, outputs))
        yield tuple(cuts), (x, small, bias), {}


def _few(channels: int) -> int:
    """Few channels that both kernels are compiled for as for all of these: of the same tile, and aligned alike."""
    return min(channels, 64 + channels % 16)


def _is_plain(conv: Any) -> bool:
    """Whether a convolution is the 3x3 one that keeps a picture's size, and nobody has wrapped it or looks on."""
    if type(conv) is not nn.Conv2d or not unwatched(conv) or "forward" in vars(conv) or is_offloaded(conv):
        return False
    shape = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    return shape == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")


def upsample_reasons(module: Any) -> list[str]:
    """Why an `Upsample2D` is not the plain case; empty when it is."""
    reasons = []
    if module.use_conv_transpose or not module.interpolate:
        reasons.append("an upsampling that is not to the nearest pixel")
    if not module.use_conv:
        reasons.append("an upsampling without a convolution")
    if module.norm is not None:
        reasons.append("an upsampling that normalises first")
    return reasons
