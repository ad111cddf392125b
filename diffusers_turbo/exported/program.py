"""From a UNet to an exported program: which sizes stay open."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from .inputs import MOST_ROWS, Bounds

MOST_SIDE = 1024
"""Largest side of a latent whose size stays open: 8192 pixels."""

MOST_TOKENS = 1024
"""Longest prompt's embedding: thirteen times CLIP's 77."""

LEAST_SIDE = 2
"""Smallest side on a UNet's coarsest level: torch.export takes a side of one for a constant."""


def bounds_for(inputs: tuple[Tensor, ...], channels: tuple[int, ...], *, dynamic: bool) -> Bounds:
    """Return the sizes that an export may be called with.

    Args:
        inputs: sample, timesteps, context and SDXL's two conditions, as they are exported.
        channels: of the UNet's levels, the finest first.
        dynamic: whether batch, height, width and length of the prompt stay open.
    """
    sample, _, context, *added = inputs
    rows, latent_channels, height, width = sample.shape
    multiple = 2 ** (len(channels) - 1) if dynamic else 1
    side = [LEAST_SIDE * multiple, MOST_SIDE]
    return Bounds(
        rows=[1, MOST_ROWS] if dynamic else [rows, rows],
        height=side if dynamic else [height, height],
        width=side if dynamic else [width, width],
        multiple=multiple,
        tokens=[LEAST_SIDE, MOST_TOKENS] if dynamic else [context.shape[1]] * 2,
        # the widest is a gated feed-forward: both halves are 8 times its input; a level has a fourth of the one above
        widest=max(8 * wide // 4**level for level, wide in enumerate(channels)),
        channels=latent_channels,
        context=context.shape[2],
        added=[tensor.shape[1] for tensor in added],
    )


def export_program(module: nn.Module, inputs: tuple[Tensor, ...], bounds: Bounds, *, dynamic: bool) -> Any:
    """Export `module` on these inputs with torch.export."""
    with torch.no_grad(), warnings.catch_warnings():
        # torch's own deprecations while it exports
        warnings.simplefilter("ignore")
        shapes = _dynamic_shapes(bounds) if dynamic else None
        return torch.export.export(module, inputs, dynamic_shapes=shapes, strict=False)


def _dynamic_shapes(bounds: Bounds) -> dict[str, Any]:
    rows = Dim("rows", min=bounds.rows[0], max=bounds.rows[1])
    tokens = Dim("tokens", min=bounds.tokens[0], max=bounds.tokens[1])
    height, width = (_side(name, side, bounds.multiple) for name, side in (("h", bounds.height), ("w", bounds.width)))
    shapes: dict[str, Any] = {
        "sample": {0: rows, 2: height, 3: width},
        "timestep": {0: rows},
        "encoder_hidden_states": {0: rows, 1: tokens},
    }
    return {**shapes, "added": tuple({0: rows} for _ in bounds.added)} if bounds.added else shapes


def _side(name: str, limits: list[int], multiple: int) -> Any:
    dim = Dim(name, min=limits[0] // multiple, max=limits[1] // multiple)
    return multiple * dim if multiple > 1 else dim
