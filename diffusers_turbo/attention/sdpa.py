"""PyTorch's scaled dot product attention, its kernel chosen by PyTorch or by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from diffusers_turbo.errors import InvalidOptionError, NotSupportedError, explain_failure

from .alignment import align_bias, whole_vectors
from .base import Tolerance, TurboAttnProcessor, needs_grad
from .limits import AttentionLayer, Limits, reasons_against

_TORCH_SOURCE = "https://github.com/pytorch/pytorch/blob/main/aten/src/ATen/native/transformers/cuda/sdp_utils.cpp"
_HALF = (torch.float16, torch.bfloat16)
_AMPERE_FOR_BF16 = {torch.bfloat16: (8, 0)}

BACKENDS: Mapping[str, tuple[Limits, ...]] = {
    "auto": (Limits(kernel="SDPA"),),
    "flash": (
        Limits(
            kernel="SDPA flash",
            devices=("cuda",),
            dtypes=_HALF,
            lowest_sm=(8, 0),
            largest_head_dim=256,
            masks=False,
            sources={
                "lowest_sm": f"{_TORCH_SOURCE} check_flash_attention_hardware_support",
                "largest_head_dim": f"{_TORCH_SOURCE} check_head_dim_size_flash",
            },
        ),
        Limits(kernel="SDPA flash", devices=("cpu",)),
    ),
    "efficient": (
        Limits(
            kernel="SDPA efficient",
            devices=("cuda",),
            dtypes=(torch.float32, *_HALF),
            lowest_sm=(5, 0),
            lowest_sm_by_dtype=_AMPERE_FOR_BF16,
            sources={
                "lowest_sm": f"{_TORCH_SOURCE} check_mem_efficient_hardware_support",
                "lowest_sm_by_dtype": f"{_TORCH_SOURCE} can_use_mem_efficient_attention",
            },
        ),
    ),
    "cudnn": (
        Limits(
            kernel="SDPA cuDNN",
            devices=("cuda",),
            dtypes=_HALF,
            lowest_sm=(8, 0),
            largest_head_dim=128,
            # The one generation where torch and cuDNN releases differ; the trial call has the last word.
            largest_head_dim_by_sm={(9, 0): 256, (10, 0): 256},
            largest_head_dim_grad=128,
            sources={
                "lowest_sm": f"{_TORCH_SOURCE} check_cudnn_hardware_support",
                "largest_head_dim": f"{_TORCH_SOURCE} check_cudnn_tensor_shapes",
                "largest_head_dim_by_sm": f"{_TORCH_SOURCE} check_cudnn_tensor_shapes",
                "largest_head_dim_grad": f"{_TORCH_SOURCE} check_cudnn_d256_bprop_head_dim",
            },
        ),
    ),
    "math": (Limits(kernel="SDPA math"),),
}


class SDPAAttnProcessor(TurboAttnProcessor):
    """`F.scaled_dot_product_attention`, the fastest exact attention PyTorch brings along.

    A named backend calls that kernel's operator itself. The public way to choose one, `torch.nn.attention.sdpa_kernel`,
    sets flags of the whole process, which other threads then see and can leave set. No flag is read or written here.

    Fused kernels keep scores and softmax in fp32 registers whatever the input's dtype, and "math" computes 16-bit
    inputs in fp32: the layer's upcast flags ask for no more than that.

    Args:
        backend: "auto" (PyTorch chooses for each call), "flash", "efficient", "cudnn" or "math".

    Raises:
        InvalidOptionError: for another backend.
    """

    tolerance = TurboAttnProcessor.tolerance | {
        # Room for the fused fp32 kernels of a GPU, not measured yet; on a CPU tests/attention sees 1e-6.
        torch.float32: Tolerance(output=2e-5, gradient=1e-4),
    }

    def __init__(self, backend: str = "auto") -> None:
        if backend not in BACKENDS:
            names = ", ".join(repr(name) for name in BACKENDS)
            raise InvalidOptionError(
                explain_failure("SDPAAttnProcessor()", f"backend={backend!r}", f"one of {names}", "use 'auto'")
            )
        self.backend = backend

    def reasons(self, layer: AttentionLayer) -> list[str]:
        return reasons_against(BACKENDS[self.backend], layer)

    def reasons_here(self, layer: AttentionLayer) -> list[str]:
        reasons = self.reasons(layer)
        if reasons or self.backend in ("auto", "math"):
            return reasons
        failure = trial(self.backend, layer.device, layer.dtype, layer.head_dim)
        return [] if failure is None else [failure]

    def attend(self, attn: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        if self.backend == "auto":
            return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=attn.scale)
        try:
            return KERNELS[self.backend](query, key, value, mask, attn.scale)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reasons = self.reasons(_layer_of(query, mask))
            if not reasons:
                raise
            raise NotSupportedError(
                explain_failure(
                    f"attention with SDPAAttnProcessor(backend={self.backend!r})",
                    "; ".join(reasons),
                    "a layer and inputs within the kernel's limits",
                    "use backend='auto', or bring model and inputs to a dtype and device the kernel takes",
                )
            ) from error


def _flash(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    if query.device.type == "cpu":
        return _flash_on_cpu(query, key, value, mask, scale)
    if mask is not None:
        raise RuntimeError("flash attention takes no mask")
    output: Tensor = _aten._scaled_dot_product_flash_attention(*whole_vectors(query, key, value), scale=scale)[0]
    return output[..., : query.shape[-1]]


def _flash_on_cpu(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    attend = _aten._scaled_dot_product_flash_attention_for_cpu
    output: Tensor = attend(query, key, value, attn_mask=mask, scale=scale)[0]
    return output


def _efficient(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    bias = None if mask is None else align_bias(mask, *query.shape[:3])
    states, grad = whole_vectors(query, key, value), needs_grad(query, key, value)
    output: Tensor = _aten._scaled_dot_product_efficient_attention(*states, bias, grad, scale=scale)[0]
    return output[..., : query.shape[-1]]


def _cudnn(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    if key.shape[2] == 1:
        # cuDNN takes no single key; its weight is one, whatever the score.
        return value.expand_as(query)
    states, grad = whole_vectors(query, key, value), needs_grad(query, key, value)
    output: Tensor = _aten._scaled_dot_product_cudnn_attention(*states, mask, grad, scale=scale)[0]
    return output[..., : query.shape[-1]]


def _math(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    output: Tensor = _aten._scaled_dot_product_attention_math(query, key, value, mask, scale=scale)[0]
    return output


_aten: Any = torch.ops.aten
KERNELS: Mapping[str, Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor]] = {
    "flash": _flash,
    "efficient": _efficient,
    "cudnn": _cudnn,
    "math": _math,
}


@cache
def trial(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Call a named backend once on a small input: None when it works, else what it said. Remembered for the process.

    Raises:
        torch.OutOfMemoryError: when even the small input does not fit; not remembered.
    """
    states = torch.zeros(1, 1, 16, head_dim, device=device, dtype=dtype)
    try:
        output = KERNELS[backend](states, states, states, None, 1.0)
        # Reading a value waits for the kernel, which reports its failure no earlier.
        finite = bool(output.isfinite().all())
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AttributeError) as error:
        return f"a trial call of SDPA {backend} failed: {str(error).strip().splitlines()[0]}"
    return None if finite else f"a trial call of SDPA {backend} gave NaN"


def _layer_of(query: Tensor, mask: Tensor | None) -> AttentionLayer:
    sm = torch.cuda.get_device_capability(query.device) if query.device.type == "cuda" else None
    return AttentionLayer(
        heads=query.shape[1],
        head_dim=query.shape[-1],
        dtype=query.dtype,
        device=query.device,
        sm=sm,
        masked=mask is not None,
        grad=query.requires_grad,
    )
