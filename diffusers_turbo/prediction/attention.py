"""What attention kernels take of memory, in place of the kernels, which the meta device does not have."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..actions.attention import FusedAttention, processor_for
from ..attention import AttentionLayer, TurboAttnProcessor, attention_layers, read_layer, why_kept
from ..attention.limits import Limits, reasons_against
from ..attention.sdpa import BACKENDS, SDPAAttnProcessor
from ..attention.xformers import XFormersAttnProcessor
from ..facts.device import DeviceFacts
from ..planning.options import Options, SDPAAttention, XFormersAttention

PREFERRED = ("cudnn", "flash", "efficient")
"""The order in which PyTorch tries its kernels on a Hopper card; the first two take the same memory."""

# the efficient kernel keeps wider heads than this in an fp32 buffer of the output's shape, if the output is 16-bit:
# https://github.com/pytorch/pytorch/blob/main/aten/src/ATen/native/transformers/cuda/mem_eff_attention/kernel_forward.h
_WIDEST_IN_REGISTERS = 128

_aten: Any = torch.ops.aten


class KernelMemory(TorchFunctionMode):
    """Has `F.scaled_dot_product_attention` make what the kernel that `device` would choose makes."""

    def __init__(self, device: DeviceFacts) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function, or what stands in for it."""
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        kernel = self.kernel(query, masked=attn_mask is not None)
        if kernel is not None:
            return fused_output(query, value, kernel)
        attend = _aten._scaled_dot_product_attention_math
        output: Tensor = attend(
            query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
        )[0]
        return output

    def kernel(self, query: Tensor, *, masked: bool) -> str | None:
        """Name the fused kernel for `[B, H, N, D]` queries; None where only the plain formula takes them."""
        dtype = str(query.dtype).removeprefix("torch.")
        layer = on_device(
            AttentionLayer(
                heads=query.shape[1],
                head_dim=query.shape[-1],
                dtype=query.dtype,
                device=query.device,
                masked=masked,
            ),
            self.device,
        )
        runs = self.device.fused_sdpa(dtype)
        return next((name for name in PREFERRED if name in runs and not reasons_against(BACKENDS[name], layer)), None)


def fused_output(query: Tensor, value: Tensor, kernel: str) -> Tensor:
    """Make what a fused kernel makes: the output `[B, H, N, D]` over `[B, N, H, D]` memory, and its side products."""
    batch, heads, n_query, head_dim = query.shape
    shape = (batch, n_query, heads, value.shape[-1])
    output = query.new_empty(shape).transpose(1, 2)
    if kernel != "efficient":
        query.new_empty(batch, heads, n_query, dtype=torch.float32)  # log-sum-exp of the scores
    elif head_dim > _WIDEST_IN_REGISTERS and query.element_size() == 2:
        query.new_empty(shape, dtype=torch.float32)
    return output


class FusedStandIn(TurboAttnProcessor):
    """Takes the memory of xFormers' kernels, which are SDPA's, and computes nothing."""

    limits = (Limits(kernel="stand-in"),)

    def attend(self, attn: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        wide = query.shape[-1] > 256 or query.dtype == torch.float32 or mask is not None
        return fused_output(query, value, "efficient" if wide else "flash")


def set_processors(root: nn.Module, options: Options | None, device: DeviceFacts) -> None:
    """Give a meta component's layers the processors that `options` ask for on `device`, as the action would.

    Without options only what cannot run on the meta device is replaced.
    """
    for name, attn in attention_layers(root).items():
        layer = on_device(read_layer(name, attn), device)
        if why_kept(attn.processor, layer.kind) is not None:
            continue
        processor = attn.processor if options is None else _wanted(options, layer)
        attn.processor = FusedStandIn() if _is_xformers(processor) else processor


def _wanted(options: Options, layer: AttentionLayer) -> Any:
    if isinstance(options, XFormersAttention):
        return SDPAAttnProcessor() if XFormersAttnProcessor().reasons(layer) else FusedStandIn()
    if isinstance(options, FusedAttention):
        options = SDPAAttention(backend=options.backend)
    processor = processor_for(options)
    return SDPAAttnProcessor() if processor.reasons(layer) else processor


def _is_xformers(processor: object) -> bool:
    return type(processor).__name__.startswith("XFormers")


def on_device(layer: AttentionLayer, device: DeviceFacts) -> AttentionLayer:
    """Describe a layer of the meta device as it will run."""
    return replace(layer, device=torch.device(device.device_type), sm=device.sm)
