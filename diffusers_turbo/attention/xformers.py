"""xFormers' memory-efficient attention, where a real call of it has succeeded."""

from __future__ import annotations

import importlib
import textwrap
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from diffusers_turbo.errors import MissingPackageError, explain_failure

from .alignment import align_bias, whole_vectors
from .base import TurboAttnProcessor
from .limits import AttentionLayer, Limits
from .sdpa import SDPAAttnProcessor

_XFORMERS_SOURCE = "https://github.com/facebookresearch/xformers/blob/main/xformers/ops/fmha"


class XFormersAttnProcessor(TurboAttnProcessor):
    """`xformers.ops.memory_efficient_attention`, which keeps scores and softmax in fp32 registers, as SDPA does.

    Installed is not usable: built for another torch or CUDA, the package imports and each of its kernels refuses. So
    `reasons_here` makes a real call on the layer's device, with its dtype and head size, once a process.

    Args:
        attention_op: the pair (forward, backward) of xFormers operators to use; None lets xFormers choose.
    """

    limits = (
        Limits(
            kernel="xFormers",
            devices=("cuda",),
            dtypes=(torch.float32, torch.float16, torch.bfloat16),
            lowest_sm=(5, 0),
            lowest_sm_by_dtype={torch.bfloat16: (8, 0)},
            sources={
                "lowest_sm": f"{_XFORMERS_SOURCE}/common.py CUDA_MINIMUM_COMPUTE_CAPABILITY",
                "lowest_sm_by_dtype": f"{_XFORMERS_SOURCE}/common.py not_supported_reasons",
            },
        ),
    )

    tolerance = SDPAAttnProcessor.tolerance  # the same kernels

    def __init__(self, attention_op: Any = None) -> None:
        self.attention_op = attention_op

    def reasons_here(self, layer: AttentionLayer) -> list[str]:
        reasons = self.reasons(layer)
        if reasons:
            return reasons
        failure = trial(layer.device, layer.dtype, layer.head_dim, self.attention_op)
        return [] if failure is None else [failure]

    def attend(self, attn: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        head_dim = query.shape[-1]
        bias = None if mask is None else align_bias(mask, *query.shape[:3])
        # xFormers wants [B, N, H, D].
        query, key, value = (states.transpose(1, 2) for states in whole_vectors(query, key, value))
        output: Tensor
        if torch.compiler.is_compiling():
            output, _ = _forward(query, key, value, bias, attn.scale, *_op_names(self.attention_op))
        else:
            output = load_ops().memory_efficient_attention(
                query, key, value, attn_bias=bias, scale=attn.scale, op=self.attention_op
            )
        return output.transpose(1, 2)[..., :head_dim]


def load_ops() -> Any:
    """The module `xformers.ops`.

    Raises:
        MissingPackageError: when xFormers is not installed or cannot be imported here.
    """
    try:
        return importlib.import_module("xformers.ops")
    except Exception as error:  # a binary package built for another torch can fail in any way
        raise MissingPackageError(
            explain_failure(
                "importing xformers",
                f"{type(error).__name__}: {error}",
                f"an xformers built for torch {torch.__version__}",
                "pip install xformers, or use SDPAAttnProcessor, which runs the same kernels",
            )
        ) from error


@cache
def trial(device: torch.device, dtype: torch.dtype, head_dim: int, attention_op: Any = None) -> str | None:
    """Call xFormers once on a small input: None when it works, else what it said. Remembered for the process.

    Raises:
        torch.OutOfMemoryError: when even the small input does not fit; not remembered.
    """
    states = torch.zeros(1, 1, 16, head_dim, device=device, dtype=dtype)
    try:
        output = XFormersAttnProcessor(attention_op).attend(SimpleNamespace(scale=1.0), states, states, states, None)
        # Reading a value waits for the kernel, which reports its failure no earlier.
        finite = bool(output.isfinite().all())
    except torch.OutOfMemoryError:
        raise
    except MissingPackageError as error:
        return str(error)
    except (RuntimeError, ValueError) as error:
        return f"a trial call of xFormers failed: {textwrap.shorten(str(error), 400)}"
    return None if finite else "a trial call of xFormers gave NaN"


# torch.compile cannot trace xFormers' search for an operator, so what it is shown is one operator of ours.
# An operator's arguments are tensors and plain values: xFormers' own are named by their NAME, "" leaves the choice.
_SCHEMA = "(Tensor query, Tensor key, Tensor value, Tensor? bias, float scale, str forward_op, str backward_op)"


@torch.library.custom_op(
    "diffusers_turbo::xformers_attention", mutates_args=(), schema=f"{_SCHEMA} -> (Tensor, Tensor)"
)
def _forward(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float, forward_op: str, backward_op: str
) -> tuple[Tensor, Tensor]:
    """The output `[B, N, H, D]` and, for the gradient, log-sum-exp `[B, H, N]` of the scores."""
    output, log_sum = load_ops().memory_efficient_attention_forward_requires_grad(
        query, key, value, attn_bias=bias, scale=scale, op=_op_named("ALL_FW_OPS", forward_op)
    )
    return output.contiguous(), log_sum[..., : query.shape[1]].contiguous()


@_forward.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float, forward_op: str, backward_op: str
) -> tuple[Tensor, Tensor]:
    batch, n_query, heads, _ = query.shape
    return query.new_empty(query.shape), query.new_empty(batch, heads, n_query, dtype=torch.float32)


@torch.library.custom_op(
    "diffusers_turbo::xformers_attention_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor output, Tensor log_sum, {_SCHEMA[1:]} -> (Tensor, Tensor, Tensor)",
)
def _backward(
    grad: Tensor,
    output: Tensor,
    log_sum: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    scale: float,
    forward_op: str,
    backward_op: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values."""
    backward, operator = load_ops().memory_efficient_attention_backward, _op_named("ALL_BW_OPS", backward_op)
    grads = backward(grad.contiguous(), output, log_sum, query, key, value, attn_bias=bias, scale=scale, op=operator)
    return grads[0].contiguous(), grads[1].contiguous(), grads[2].contiguous()


@_backward.register_fake
def _(grad: Tensor, output: Tensor, log_sum: Tensor, query: Tensor, key: Tensor, value: Tensor, *options: Any) -> Any:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, ctx.forward_op, ctx.backward_op = inputs
    ctx.save_for_backward(*output, *tensors)


def _run_backward(ctx: Any, grad: Tensor, grad_log_sum: Tensor | None) -> tuple[Tensor | None, ...]:
    grads = _backward(grad, *ctx.saved_tensors, ctx.scale, ctx.forward_op, ctx.backward_op)
    return *grads, None, None, None, None


_forward.register_autograd(_run_backward, setup_context=_save_for_backward)


def _op_names(attention_op: Any) -> tuple[str, str]:
    if attention_op is None:
        return "", ""
    forward_op, backward_op = attention_op
    return forward_op.NAME if forward_op else "", backward_op.NAME if backward_op else ""


def _op_named(family: str, name: str) -> Any:
    if not name:
        return None
    return next(op for op in getattr(importlib.import_module("xformers.ops.fmha"), family) if name == op.NAME)
