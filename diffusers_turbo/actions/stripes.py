"""Stripes: what each cross-attention projection of a network takes from a prompt that was projected ahead."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..attention import attention_layers, layer_kind, why_kept
from ..graphs.watch import why_not_capturable
from .undo import ABSENT, owned, put

NETWORKS = ("UNet2DConditionModel", "ControlNetModel")
"""Networks that hand `encoder_hidden_states` to their cross-attention layers as it is."""

PROJECTIONS = ("to_k", "to_v", "to_kv")
"""What a layer may send the prompt through; `to_kv` is the first two, fused."""


@dataclass(eq=False)
class Stripe:
    """The forward of one projection: its stripe of what was projected ahead; anything else is projected as ever."""

    module: nn.Module
    start: int
    stop: int
    width: int

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return `[B, M, stop - start]` of `[B, M, width]`, or the projection of an input of any other width."""
        if x.shape[-1] == self.width:
            return x[..., self.start : self.stop]
        return type(self.module).forward(self.module, x, *args, **kwargs)


@dataclass
class Stripes:
    """The stripes of one network, on the modules that stand there now: an adapter puts modules of its own there."""

    root: nn.Module
    laid: list[Stripe] = field(default_factory=list)
    width: int = 0

    def lay(self) -> str | None:
        """Give each projection its stripe; return why the prompt can't be projected ahead, if it can't."""
        layers = cross_attention_layers(self.root)
        modules = standing(layers)
        if not self.are_on(modules):
            self.lift()
            if not (reason := _why_not(self.root, layers, modules)):
                self._lay(layers)
            return reason
        return _why_not(self.root, layers, [])

    def _lay(self, layers: list[Any]) -> None:
        self.width = sum(2 * attn.inner_kv_dim for attn in layers)
        # one column more where the prompt itself is as wide, so that the two can't be taken for each other
        self.width += self.width == layers[0].cross_attention_dim
        start = 0
        for attn in layers:
            middle, stop = start + attn.inner_kv_dim, start + 2 * attn.inner_kv_dim
            for name, cut in zip(PROJECTIONS, [(start, middle), (middle, stop), (start, stop)], strict=True):
                if (module := getattr(attn, name, None)) is not None:
                    stripe = Stripe(module, *cut, self.width)
                    put(module, "forward", stripe)
                    self.laid.append(stripe)
            start = stop

    def are_on(self, modules: list[nn.Module]) -> bool:
        """Whether exactly these modules carry the stripes."""
        return len(self.laid) == len(modules) and all(
            stripe.module is module and owned(module, "forward") is stripe
            for stripe, module in zip(self.laid, modules, strict=True)
        )

    def lift(self) -> str | None:
        """Give each projection its own forward back."""
        left = 0
        for stripe in self.laid:
            if owned(stripe.module, "forward") is stripe:
                put(stripe.module, "forward", ABSENT)
            else:
                left += 1
        self.laid = []
        return f"{left} projections of {type(self.root).__name__} got another forward meanwhile" if left else None

    def project(self, prompt: Tensor) -> Tensor:
        """Return `[B, M, width]`: keys and values of each layer in turn, of a prompt `[B, M, C]`."""
        parts = [part for attn in cross_attention_layers(self.root) for part in (attn.to_k(prompt), attn.to_v(prompt))]
        missing = self.width - sum(part.shape[-1] for part in parts)
        if missing:
            parts.append(parts[0].new_zeros(*prompt.shape[:2], missing))
        return torch.cat(parts, dim=-1)


def cross_attention_layers(root: nn.Module) -> list[Any]:
    """The `Attention` layers of a network that attend to the prompt."""
    return [attn for attn in attention_layers(root).values() if attn.is_cross_attention]


def standing(layers: list[Any]) -> list[nn.Module]:
    """The modules that project the prompt in these layers now."""
    found = (getattr(attn, name, None) for attn in layers for name in PROJECTIONS)
    return [module for module in found if module is not None]


def _why_not(root: nn.Module, layers: list[Any], modules: list[nn.Module]) -> str | None:
    """Why a network's prompt can't be projected ahead; `modules` are those that are to be given stripes."""
    name, config = type(root).__name__, getattr(root, "config", None)
    if name not in NETWORKS:
        return f"what a {name} does with its prompt is not known"
    if "forward" in vars(root):
        return f"the forward of {name} was replaced (a trace, an export), which was made for the prompt itself"
    if getattr(root, "encoder_hid_proj", None) is not None:
        return f"{name} sends its prompt through encoder_hid_proj first (an IP-Adapter, say)"
    if getattr(config, "addition_embed_type", None) not in (None, "text_time"):
        return f"{name} adds its prompt to the time embedding"
    if not layers:
        return f"{name} has no cross-attention"
    for attn in layers:
        if layer_kind(attn) != "plain" or attn.norm_cross is not None:
            return "a cross-attention layer with added keys, or one that normalises the prompt"
        if reason := why_kept(attn.processor, "plain"):
            return reason
    if any("forward" in vars(module) for module in modules):
        return "a projection whose forward was replaced"
    return why_not_capturable(nn.ModuleList(standing(layers)))
