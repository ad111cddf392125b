"""What a kernel accepts, as data, and the pure check that says why a layer is outside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

SM = tuple[int, int]
"""Compute capability of an NVIDIA GPU, such as (8, 6)."""


@dataclass(frozen=True, kw_only=True)
class AttentionLayer:
    """What decides whether a kernel can take a layer; holds no tensor and no module.

    Attributes:
        name: dotted name of the module in its model.
        heads, head_dim: H and D of `[B, H, N, D]`.
        kind: "plain", "added_kv" (keys of the context beside the layer's own) or "joint" (SD3).
        cross: keys come from a context.
        dtype, device: of the layer's weights.
        sm: compute capability of an NVIDIA device; None elsewhere.
        masked: the layer will be given a mask.
        grad: a gradient will be taken.
    """

    name: str = ""
    heads: int
    head_dim: int
    kind: str = "plain"
    cross: bool = False
    dtype: torch.dtype
    device: torch.device
    sm: SM | None = None
    masked: bool = False
    grad: bool = False


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one kernel accepts; a field left out sets no limit.

    Attributes:
        kernel: its name, as reasons print it.
        devices: device types it exists for.
        dtypes: of queries, keys and values.
        lowest_sm, lowest_sm_by_dtype: oldest NVIDIA generation, overall and for single dtypes.
        largest_head_dim, largest_head_dim_by_sm: upper bound of D, overall and for single generations.
        largest_head_dim_grad: upper bound of D when a gradient is taken.
        masks: accepts a bias on the scores.
        sources: for each field above that holds a number, where the number is from.
    """

    kernel: str
    devices: tuple[str, ...] | None = None
    dtypes: tuple[torch.dtype, ...] | None = None
    lowest_sm: SM | None = None
    lowest_sm_by_dtype: Mapping[torch.dtype, SM] = field(default_factory=dict)
    largest_head_dim: int | None = None
    largest_head_dim_by_sm: Mapping[SM, int] = field(default_factory=dict)
    largest_head_dim_grad: int | None = None
    masks: bool = True
    sources: Mapping[str, str] = field(default_factory=dict)


def reasons_against(limits: Sequence[Limits], layer: AttentionLayer) -> list[str]:
    """Why none of a kernel's variants can take `layer`; empty when one can.

    Variants differ by device: the first one for the layer's device decides.

    >>> half = Limits(kernel="fast", devices=("cuda",), dtypes=(torch.float16,), largest_head_dim=256)
    >>> vae = AttentionLayer(heads=1, head_dim=512, dtype=torch.float32, device=torch.device("cuda"), sm=(8, 0))
    >>> reasons_against([half], vae)
    ['fast takes float16, the layer is float32', 'fast takes heads up to 256, the layer has 512']
    """
    device = layer.device.type
    for variant in limits:
        if variant.devices is None or device in variant.devices:
            return _reasons(variant, layer)
    devices = sorted({name for variant in limits for name in variant.devices or ()})
    return [f"{limits[0].kernel} runs on {' or '.join(devices)}, the layer is on {device}"]


def _reasons(limits: Limits, layer: AttentionLayer) -> list[str]:
    kernel, reasons = limits.kernel, []
    if limits.dtypes is not None and layer.dtype not in limits.dtypes:
        names = " or ".join(_name(dtype) for dtype in limits.dtypes)
        reasons.append(f"{kernel} takes {names}, the layer is {_name(layer.dtype)}")
    if layer.sm is not None:
        lowest = max(limits.lowest_sm or (0, 0), limits.lowest_sm_by_dtype.get(layer.dtype, (0, 0)))
        if layer.sm < lowest:
            found = f"{layer.sm[0]}.{layer.sm[1]}"
            reasons.append(f"{kernel} in {_name(layer.dtype)} needs SM {lowest[0]}.{lowest[1]}, the GPU has {found}")
    largest = limits.largest_head_dim
    if layer.sm is not None:
        largest = limits.largest_head_dim_by_sm.get(layer.sm, largest)
    if largest is not None and layer.head_dim > largest:
        reasons.append(f"{kernel} takes heads up to {largest}, the layer has {layer.head_dim}")
    largest = limits.largest_head_dim_grad
    if layer.grad and largest is not None and layer.head_dim > largest:
        reasons.append(f"{kernel} has no gradient for heads above {largest}, the layer has {layer.head_dim}")
    if layer.masked and not limits.masks:
        reasons.append(f"{kernel} takes no mask, the layer is given one")
    return reasons


def read_layer(
    name: str,
    attn: Any,
    *,
    sm: SM | None = None,
    dtype: torch.dtype | None = None,
    masked: bool = False,
    grad: bool = False,
) -> AttentionLayer:
    """Describe a diffusers `Attention` module.

    Args:
        name: what to call it.
        attn: the module.
        sm: compute capability of its device; asked of torch when left out and the module is on an NVIDIA GPU.
        dtype: the dtype it will compute in, where that is not the dtype of its weights (autocast, layerwise casting).
        masked, grad: how it will be called, see `AttentionLayer`.
    """
    weight = _weight(attn.to_q)
    if sm is None and weight.device.type == "cuda":
        sm = torch.cuda.get_device_capability(weight.device)
    return AttentionLayer(
        name=name,
        heads=attn.heads,
        head_dim=attn.inner_dim // attn.heads,
        kind=layer_kind(attn),
        cross=attn.is_cross_attention,
        dtype=dtype or weight.dtype,
        device=weight.device,
        sm=sm,
        masked=masked,
        grad=grad,
    )


def layer_kind(attn: Any) -> str:
    """Which of the three ways an `Attention` layer is run: "plain", "added_kv" or "joint"."""
    if attn.added_kv_proj_dim is None:
        return "plain"
    return "added_kv" if getattr(attn, "add_q_proj", None) is None else "joint"


def _weight(projection: nn.Module) -> torch.Tensor:
    weight = getattr(projection, "weight", None)
    return weight if isinstance(weight, torch.Tensor) else next(projection.parameters())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
