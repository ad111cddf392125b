"""The part of a UNet before the first cross-attention, computed once for both halves of guidance.

A pipeline with classifier-free guidance doubles its latents, `cat([latents] * 2)`, and only the prompts differ. Until a
layer has seen the prompt, both halves are equal. Two modules there are worth it: the first resnet, and the
self-attention of the first transformer block, the dearest of the network. Each is given one half, and its result is
doubled. That the halves are equal is known from the pipeline's guidance flag and never found out by comparing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import NotSupportedError, explain_failure
from ..graphs.signature import MODE
from ..modules import has_own_forward
from ..planning.options import DOUBLING_PIPELINES, SharedGuidance
from .calls import ScopedCallOver
from .components import denoiser_of, require_plain_weights
from .undo import Journal, journaling

TRIED = "enable_shared_guidance()"

SHARED = "both halves of guidance are equal"
"""The mode in which the UNet is called then."""


@dataclass(eq=False)
class OnOneHalf:
    """The forward of a module that has not seen the prompt: of one half where both are equal, else as ever.

    Attributes:
        root: the UNet, which says in `MODE` whether they are.
        inner: the forward that was put on the module before, if any.
        own: the forward of its class, held here since compilers look it up on no class that diffusers hides from them.
    """

    root: nn.Module
    module: nn.Module
    inner: Callable[..., Any] | None
    own: Callable[..., Any]

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the module on the first half of `x` and of each tensor beside it, `[2B, ..]`, and double the result."""
        if getattr(self.root, MODE, None) != SHARED:
            return self._forward(x, *args, **kwargs)
        batch = x.shape[0]

        def half(value: Any) -> Any:
            return value[: batch // 2] if isinstance(value, Tensor) and value.shape[:1] == (batch,) else value

        result = self._forward(half(x), *map(half, args), **{name: half(value) for name, value in kwargs.items()})
        return torch.cat([result, result])

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.own(self.module, *args, **kwargs) if self.inner is None else self.inner(*args, **kwargs)


class GuidanceCall:
    """Stands over the UNet's call and says when both halves of its input are equal."""

    def __init__(self, root: nn.Module, inner: Callable[..., Any]) -> None:
        """Stand over `inner`, the call of `root`."""
        self.root, self.inner = root, inner
        self.calls = self.shared = 0
        self.pipe: Any = None

    def enter_call(self, pipe: Any) -> None:
        """A call of the pipeline begins, whose flag is to be looked at."""
        self.pipe = pipe

    def leave_call(self) -> None:
        """A call of the pipeline ends."""
        self.pipe = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the UNet."""
        self.calls += 1
        sample = args[0] if args else kwargs.get("sample")
        # read at every call: a callback may end guidance in the middle
        guided = self.pipe is not None and bool(self.pipe.do_classifier_free_guidance)
        if not guided or torch.is_grad_enabled() or not isinstance(sample, Tensor) or sample.shape[0] % 2:
            return self.inner(*args, **kwargs)
        self.shared += 1
        setattr(self.root, MODE, SHARED)
        try:
            return self.inner(*args, **kwargs)
        finally:
            delattr(self.root, MODE)

    def tell(self) -> str:
        """Say what happened so far."""
        return f"{self.shared} of {self.calls} calls of the UNet had two equal halves"


@dataclass
class SharesHalves(ScopedCallOver):
    """The UNet's outer call; also the call scope in which the pipeline's guidance flag is looked at."""

    def make(self, inner: Callable[..., Any]) -> GuidanceCall:
        """Return the call over the UNet's own."""
        return GuidanceCall(self.module, inner)


def apply(pipe: Any, options: SharedGuidance) -> Journal:
    """Exact: compute what both halves of guidance have in common once, in UNets without an added embedding."""
    require_plain_weights(pipe, TRIED)
    name, unet = denoiser_of(pipe, TRIED)
    if reason := why_not_shared(pipe, unet):
        needed = f"one of {', '.join(DOUBLING_PIPELINES)}, and a UNet that starts without its prompt"
        raise NotSupportedError(explain_failure(TRIED, reason, needed, "leave this switch off"))
    modules = modules_before_the_prompt(unet)
    with journaling() as journal:
        for module in modules.values():
            before = vars(module).get("forward")
            journal.set_attribute(module, "forward", OnOneHalf(unet, module, before, type(module).forward))
        change = SharesHalves(unet)
        change.install()
        journal.add(change)
        journal.scopes.append(change)
        journal.note(f"once for both halves: {', '.join(f'{name}.{path}' for path in modules)}")
    return journal


def modules_before_the_prompt(unet: nn.Module) -> dict[str, nn.Module]:
    """The modules worth sharing, by dotted name, of those that run before the first cross-attention."""
    found = {"down_blocks.0.resnets.0": unet.get_submodule("down_blocks.0.resnets.0")}
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    try:
        attention = unet.get_submodule(f"{block}.attn1")
    except AttributeError:
        return found  # a first level without attention
    if not attention.is_cross_attention and unet.get_submodule(block).norm_type == "layer_norm":
        found[f"{block}.attn1"] = attention
    return found


def why_not_shared(pipe: Any, unet: nn.Module) -> str | None:
    """Return why the halves can't be known to be equal, None when they are."""
    call = inspect.unwrap(type(pipe).__call__)
    host = call.__qualname__.removesuffix(".__call__")
    if host not in DOUBLING_PIPELINES or not call.__module__.startswith("diffusers."):
        return f"whether {host} calls its denoiser with two equal halves is not known"
    config = getattr(unet, "config", None)
    if type(unet).__name__ != "UNet2DConditionModel" or getattr(config, "resnet_time_scale_shift", "") != "default":
        return f"a {type(unet).__name__} of a kind that was not tried"
    for name in ("addition_embed_type", "class_embed_type"):
        if getattr(config, name, None) is not None:
            return f"the UNet adds to its time embedding what may differ between the halves ({name})"
    if not has_own_forward(unet):
        return "the UNet's forward was replaced (a trace, an export)"
    return None
