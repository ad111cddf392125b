"""The bare prototypes that this package's tiers are measured against: channels-last, one CUDA graph a network, no more.

A graph here is keyed by the shapes of its inputs alone: a LoRA, another scale or exchanged weights would not be
noticed. That makes it a yardstick, and no switch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from ..facts.pipeline import upcasts_vae
from ..graphs.capture import CAPTURES
from ..graphs.signature import modes_of


class OneGraph:
    """A network's call as one graph for each shape of its inputs, recorded at the second sight of it."""

    def __init__(self, call: Callable[..., Any]) -> None:
        """Stand for `call`."""
        self.call = call
        self.seen: set[Any] = set()
        self.graphs: dict[Any, tuple[list[Any], Any]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Copy the inputs, replay, return copies of the outputs."""
        leaves, structure = tree_flatten((args, kwargs))
        device = next(leaf.device for leaf in leaves if isinstance(leaf, Tensor))
        key = (modes_of(device), tuple(leaf.shape for leaf in leaves if isinstance(leaf, Tensor)))
        if key not in self.seen:
            self.seen.add(key)
            return self.call(*args, **kwargs)
        if key not in self.graphs:
            static = [leaf.to(device, copy=True) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            inputs, named = tree_unflatten(static, structure)
            self.graphs[key] = static, CAPTURES[device.type](lambda: self.call(*inputs, **named), device)
        static, capture = self.graphs[key]
        for target, source in zip(static, leaves, strict=True):
            if isinstance(target, Tensor):
                target.copy_(source)
        capture.replay()
        return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, capture.output)


def make_bare(pipe: Any, *, compiled: bool) -> None:
    """Put one graph over the UNet's call and one over the VAE decoder's, compiled first or not.

    A VAE that its pipeline casts for each decode (SDXL's) gets none, since its weights move.
    """
    parts: list[nn.Module] = [pipe.unet]
    if not (upcasts_vae(pipe) and pipe.vae.dtype == torch.float16):
        parts.append(pipe.vae.decoder)
    for module in (pipe.unet, pipe.vae):
        module.to(memory_format=torch.channels_last)
    if compiled:
        for module in (pipe.unet, pipe.vae.decoder):
            module.compile()
    for part in parts:
        inner: Any = part._compiled_call_impl or part._call_impl
        part._compiled_call_impl = OneGraph(inner)
