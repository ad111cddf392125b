"""1x1 convolutions as matrix products: in channels-last they are the same sums over the same memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import NotSupportedError, explain_failure
from ..planning.options import PointwiseMatmul
from .components import denoiser_of, modules_of, require_plain_weights
from .undo import Journal, journaling

TRIED = "enable_pointwise_matmul()"


@dataclass(eq=False)
class PointwiseProduct:
    """The forward of a 1x1 convolution: a matrix product where channels are innermost, else the convolution."""

    conv: nn.Conv2d

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return `[B, O, H, W]` of `[B, C, H, W]`."""
        pixels = x.movedim(1, -1)
        # an adapter may ask the layer for more than its input, and a picture in channels-first would be copied
        if args or kwargs or x.ndim != 4 or not pixels.is_contiguous():
            return type(self.conv).forward(self.conv, x, *args, **kwargs)
        # of two dimensions, so that cuBLAS adds the bias itself
        product = F.linear(pixels.flatten(0, 2), self.conv.weight.flatten(1), self.conv.bias)
        return product.view(*pixels.shape[:3], product.shape[-1]).movedim(-1, 1)


def apply(pipe: Any, options: PointwiseMatmul) -> Journal:
    """Exact: run the 1x1 convolutions of denoiser and VAE as matrix products on channels-last activations."""
    require_plain_weights(pipe, TRIED)
    roots = [denoiser_of(pipe, TRIED)[1], *(part for name, part in modules_of(pipe).items() if name == "vae")]
    found = [
        module for root in roots for module in root.modules() if isinstance(module, nn.Conv2d) and is_pointwise(module)
    ]
    if not found:
        where = f"no 1x1 convolution in {', '.join(type(root).__name__ for root in roots)}"
        raise NotSupportedError(explain_failure(TRIED, where, "one", "leave this switch off"))
    with journaling() as journal:
        for conv in found:
            journal.set_attribute(conv, "forward", PointwiseProduct(conv))
        journal.note(f"{len(found)} convolutions; in force on channels-last activations (enable_channels_last())")
    return journal


def is_pointwise(module: nn.Conv2d) -> bool:
    """Whether a convolution is torch's own, of single pixels, and nobody replaced its forward."""
    return (
        type(module) is nn.Conv2d
        and module.kernel_size == module.stride == (1, 1)
        and module.padding == (0, 0)
        and module.groups == 1
        and "forward" not in vars(module)
    )
