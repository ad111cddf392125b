"""Group norms of a network with the statistics of the whole picture, gathered from tiles.

A tile that is normalised by itself has colours of its own, which no blending hides. So tiles that cover the picture run
once to be measured, and with their pooled means and variances a group norm is what it is for the untiled picture, up to
what the tiles' own norms changed in the layers below while they were measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HOOKS = ("_hf_hook", "_diffusers_hook")
"""What offload hangs on a module whose weights come and go with its forward."""


SMALLEST = 1e-30
"""Variance of a constant channel, whose reciprocal root is still a number."""


def moments(picture: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance by channel of `[1, C, h, W]`, each `[C]` and at least in float32.

    For channels of a pixel that lie together CUDA's `var_mean` takes 512 MiB for partial results, and a float32 copy of
    what is half as wide; a batch norm's statistics take one.
    """
    wide = torch.promote_types(picture.dtype, torch.float32)
    if picture.is_cuda:
        mean, reciprocal = torch.batch_norm_stats(picture, SMALLEST)
        return mean, reciprocal.pow(-2)
    if picture.is_meta:  # stands for CUDA, and knows no such operator
        return picture.new_empty(picture.shape[1], dtype=wide), picture.new_empty(picture.shape[1], dtype=wide)
    variance, mean = torch.var_mean(picture[0].to(wide), dim=(1, 2), correction=0)
    return mean, variance


def normed_by(per_channel: list[Tensor], input: Tensor, eps: float) -> Tensor:
    """Normalise `[1, C, ..]` by mean, variance and, if there are some, weight and bias, each `[C]`.

    A batch norm that has been trained is just that.
    """
    mean, variance, *affine = per_channel
    weight, bias = affine or (None, None)
    return F.batch_norm(input, mean, variance, weight, bias, training=False, eps=eps)


@dataclass(eq=False)
class PooledNorm:
    """One group norm, measured over tiles and then applied with what was measured."""

    norm: nn.GroupNorm
    mean: Tensor | None = None
    square: Tensor | None = None
    tiles: int = 0
    per_channel: list[Tensor] = field(default_factory=list)

    def measure(self, input: Tensor) -> Tensor:
        """Normalise a tile `[1, C, ..]` by itself, and pool its statistics."""
        norm, x = self.norm, input.contiguous()
        size = x[0, 0].numel()
        result, mean, reciprocal = torch.native_group_norm(
            x, norm.weight, norm.bias, len(x), x.shape[1], size, norm.num_groups, norm.eps
        )
        wide = torch.promote_types(x.dtype, torch.float32)
        mean, variance = mean.to(wide), reciprocal.to(wide).pow(-2) - norm.eps
        square = variance + mean.square()
        self.mean = mean if self.mean is None else self.mean + mean
        self.square = square if self.square is None else self.square + square
        self.tiles += 1
        return result

    def apply(self, input: Tensor) -> Tensor:
        """Normalise `[1, C, ..]` by the pooled statistics."""
        if not self.per_channel:
            self.per_channel = self._settle()
        return normed_by(self.per_channel, input, self.norm.eps)

    def _settle(self) -> list[Tensor]:
        """Return mean, variance, weight and bias `[C]`, at least in float32."""
        if self.mean is None or self.square is None:
            raise RuntimeError("a group norm that was not called while tiles were measured")
        norm = self.norm
        mean = self.mean.flatten() / self.tiles
        variance = (self.square.flatten() / self.tiles - mean.square()).clamp(min=0)
        settled = [each.repeat_interleave(norm.num_channels // norm.num_groups) for each in (mean, variance)]
        return settled + ([norm.weight.to(mean.dtype), norm.bias.to(mean.dtype)] if norm.affine else [])


def poolable(network: nn.Module) -> list[nn.GroupNorm]:
    """Return the group norms of `network`; none when offload moves their weights one by one."""
    norms = [module for module in network.modules() if type(module) is nn.GroupNorm]
    return [] if any(hook in vars(norm) for norm in norms for hook in HOOKS) else norms


@contextmanager
def forwards(replaced: dict[nn.Module, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Give modules other forwards inside the block, and then what they had."""
    before: dict[nn.Module, Any] = {module: vars(module).get("forward") for module in replaced}
    try:
        for module, forward in replaced.items():
            vars(module)["forward"] = forward
        yield
    finally:
        for module, forward in before.items():
            if forward is None:
                vars(module).pop("forward", None)
            else:
                vars(module)["forward"] = forward


@contextmanager
def shared_by(norms: list[nn.GroupNorm], measure: Callable[[], None]) -> Iterator[None]:
    """Run `measure`, which sends tiles through the network, and normalise by what was seen inside the block."""
    pooled = [PooledNorm(norm) for norm in norms]
    with forwards({each.norm: each.measure for each in pooled}):
        measure()
    with forwards({each.norm: each.apply for each in pooled if each.tiles}):
        yield
