"""Fused Triton kernels in a pipeline: each layer they fit gets a forward that calls one, on the layer itself.

Class, parameters, state-dict keys, adapters and saving stay. What a kernel cannot take at a call (another layout, a
recorded gradient, another device) runs in plain PyTorch there, and the report says how many layers and why.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import NotSupportedError, explain_failure, in_one_line
from ..fused.blocks import FusedResnetBlock, FusedTransformerBlock, resnet_reasons, successors, transformer_reasons
from ..fused.layers import (
    STAND_IN,
    FusedConv,
    FusedForward,
    FusedGEGLU,
    FusedGroupNorm,
    FusedGroupNormSiLU,
    FusedLayerNorm,
    FusedLinearGEGLU,
    SiLUDone,
    channels_last,
    stand_in,
)
from ..fused.rehearsal import rehearse
from ..fused.upsampling import FusedUpsample, upsample_reasons
from ..kernels.base import Place, interpreting, unavailable
from ..kernels.registry import KERNELS
from ..planning.options import FusedKernels
from .components import modules_of, require_plain_weights
from .undo import Journal, journaling

TAIL = ("conv_norm_out", "conv_act")
"""What UNets and the halves of a VAE call their last norm and the activation that they apply to it next."""

Replaced = tuple[nn.Module, Any]
"""A module and what stands in for its forward."""


@dataclass
class FusedLayers:
    """All stand-ins of one pipeline; changes nothing itself and says how they fared."""

    layers: list[FusedForward]
    roots: dict[str, nn.Module]

    def revert(self) -> None:
        """Nothing to put back."""

    def tell(self) -> list[str]:
        """Say of each kernel how many layers ran on it at their last call, and why the others did not."""
        told = []
        instead = (getattr(layer, "otherwise", None) for layer in self.layers)
        called = [*self.layers, *(layer for layer in instead if layer is not None and layer.refused is not None)]
        for kernel in KERNELS:
            layers = [layer for layer in called if layer.kernel == kernel]
            if layers:
                fused = sum(layer.refused == () for layer in layers)
                idle = sum(layer.refused is None for layer in layers)
                waiting = f", {idle} not called yet" if idle else ""
                told.append(f"{kernel}: {fused} of {len(layers)} layers ran the kernel at their last call{waiting}")
                told += _refusals(layers)
        norms = {layer.label.split(".")[0] for layer in self.layers if layer.kernel == "group_norm"}
        for name in sorted(norms):
            if not _lies_channels_last(self.roots[name]):
                told.append(f"{name} is not channels-last, without which few layers fit: enable_channels_last() first")
        return told


def apply(pipe: Any, options: FusedKernels) -> Journal:
    """Exact: GroupNorm with SiLU, GEGLU (with its projection), residual add with LayerNorm, bias with residual.

    One kernel each; and upsampling with the convolution after it, of the small picture.

    Raises:
        NotSupportedError: no kernel runs in this process, or no layer of the pipeline is of a kind they fit.
    """
    tried = f"{options.action}()"
    places = {name: KERNELS[name].places() for name, wanted in options.as_dict().items() if wanted}
    if not any(places.values()):
        found = "; ".join(unavailable()) or "a GPU below what Triton needs"
        needed = "Triton and an NVIDIA GPU of SM 7.0 or newer"
        raise NotSupportedError(explain_failure(tried, found, needed, "leave this switch off here"))
    return put_in(pipe, places, tried)


def put_in(pipe: Any, places: dict[str, frozenset[Place]], tried: str) -> Journal:
    """Give the layers that these kernels fit a forward that calls one, in the places where each may run.

    Raises:
        NotSupportedError: no layer of the pipeline is of a kind they fit.
    """
    require_plain_weights(pipe, tried)
    roots = modules_of(pipe)
    layers: list[FusedForward] = []
    kinds, left = Counter[str](), Counter[str]()
    with journaling() as journal:
        for component, root in roots.items():
            for name, module in root.named_modules(prefix=component):
                for group in _stand_ins(module, name, places, left):
                    if any("forward" in vars(target) for target, _ in group):
                        # one of this action's own goes first: a norm that its host's tail or block has replaced
                        left["something else replaced its forward"] += all(stand_in(x) is None for x, _ in group)
                        continue
                    for target, forward in group:
                        journal.set_attribute(target, STAND_IN, forward)
                        journal.set_attribute(target, "forward", forward)
                        kinds[type(target).__name__] += 1
                        layers += [forward] if isinstance(forward, FusedForward) else []
        for root in roots.values():
            for before, after in (pair for module in root.modules() for pair in successors(module)):
                if isinstance(block := stand_in(before), FusedTransformerBlock):
                    block.following = after
        reasons = [f"{count} left to diffusers: {reason}" for reason, count in left.items() if count]
        if not layers:
            found = "; ".join([f"nothing that fits in {', '.join(roots)}", *reasons])
            needed = "nn.GroupNorm, GEGLU or plain transformer blocks, as in UNets and their VAEs"
            raise NotSupportedError(explain_failure(tried, found, needed, "leave this switch off for this pipeline"))
        journal.note(", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())))
        for reason in reasons:
            journal.note(reason)
        if note := _compile_ahead(layers):
            journal.note(note)
        journal.add(FusedLayers(layers, roots))
    return journal


def _compile_ahead(layers: list[FusedForward]) -> str | None:
    """Compile what layers on a GPU will launch, side by side; say how it went, None where none is on a GPU."""
    if interpreting() or not torch.cuda.is_available():
        return None
    rehearsals = [one for layer in layers for one in layer.rehearsals()]
    if not rehearsals:
        return None
    start = time.perf_counter()
    count, failed = rehearse(rehearsals)
    rest = f"; {len(failed)} will be at their first launch ({in_one_line(failed[0], 160)})" if failed else ""
    return f"{count} variants of kernels compiled, or found compiled, in {time.perf_counter() - start:.1f} s{rest}"


def _stand_ins(
    module: nn.Module, label: str, places: dict[str, frozenset[Place]], left: Counter[str]
) -> Iterator[list[Replaced]]:
    """Give what to replace for the sake of `module`, in groups that go together; count in `left` what does not fit."""
    from diffusers import UNet2DConditionModel, UNet2DModel
    from diffusers.models.activations import GEGLU
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.autoencoders.vae import Decoder, Encoder
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.upsampling import Upsample2D

    kind = type(module)
    if "group_norm" in places:
        if kind in (UNet2DConditionModel, UNet2DModel, Encoder, Decoder):
            norm, act = (getattr(module, name, None) for name in TAIL)
            if type(norm) is nn.GroupNorm and type(act) is nn.SiLU:
                silu = FusedGroupNormSiLU(norm, f"{label}.{TAIL[0]}", places["group_norm"], conv=module.conv_out)
                yield [(norm, silu), (act, SiLUDone(act, module, TAIL[0]))]
        elif kind is nn.GroupNorm:
            yield [(module, FusedGroupNorm(module, label, places["group_norm"]))]
    if kind is ResnetBlock2D and ("group_norm" in places or "bias_residual" in places):
        reasons = resnet_reasons(module)
        left.update(reasons[:1])
        if not reasons:
            conv = module.conv2
            if "bias_residual" in places and type(conv) is nn.Conv2d and conv.bias is not None:
                yield [(conv, FusedConv(conv, f"{label}.conv2", places["bias_residual"]))]
            yield [(module, FusedResnetBlock(module, kind))]
    if kind is GEGLU:
        forward: Any = FusedGEGLU(module, label, places["geglu"]) if "geglu" in places else None
        if whole := places.get("linear_geglu"):  # empty on most GPUs, where not every layer need say so
            forward = FusedLinearGEGLU(module, label, whole, otherwise=forward)
        if forward is not None:
            yield [(module, forward)]
    if kind is Upsample2D and "upsample_conv" in places:
        reasons = upsample_reasons(module)
        left.update(reasons[:1])
        if not reasons:
            yield [(module, FusedUpsample(module, label, places["upsample_conv"], kind=kind))]
    if kind is BasicTransformerBlock and "add_layer_norm" in places:
        reasons = transformer_reasons(module)
        left.update(reasons[:1])
        if not reasons:
            norms = {name: getattr(module, name) for name in ("norm1", "norm2", "norm3")}
            ours = [(n, FusedLayerNorm(n, f"{label}.{name}", places["add_layer_norm"])) for name, n in norms.items()]
            if type(module.norm1) is nn.LayerNorm:
                yield ours[:1]
            yield [*ours[1:], (module, FusedTransformerBlock(module, kind))]


def _refusals(layers: list[FusedForward]) -> Iterator[str]:
    """For each reason, how many layers ran in plain PyTorch for it, and the first of them."""
    labels: dict[tuple[str, ...], list[str]] = {}
    for layer in layers:
        if layer.refused:
            labels.setdefault(layer.refused, []).append(layer.label)
    for reasons, names in labels.items():
        yield f"{len(names)} layers of {layers[0].kernel} ran {layers[0].instead} ({names[0]}): {'; '.join(reasons)}"


def _lies_channels_last(root: nn.Module) -> bool:
    """Whether the first convolution that can tell has its weights channels-last."""
    weights = (module.weight for module in root.modules() if isinstance(module, nn.Conv2d))
    return all(channels_last(weight) for weight in list(weights)[:1])
