"""The reference processor: the attention matrix written out, as the formula has it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import TurboAttnProcessor
from .limits import Limits


class NaiveAttnProcessor(TurboAttnProcessor):
    """Softmax(Q K^T * scale + mask) V with the whole `[B, H, N, M]` matrix in memory; the measure of the rest.

    `upcast_attention` takes the scores in fp32, `upcast_softmax` the softmax, as diffusers' `AttnProcessor` does.
    """

    limits = (Limits(kernel="naive attention"),)

    def attend(self, attn: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        batch, heads, n_query, head_dim = query.shape
        if mask is not None:
            mask = mask.expand(batch, heads, -1, -1).flatten(0, 1)
        weights = probabilities(attn, query.flatten(0, 1), key.flatten(0, 1), mask)
        return (weights @ value.flatten(0, 1)).view(batch, heads, n_query, head_dim)


def probabilities(attn: Any, query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    """The attention matrix `[S, N, M]` of `[S, N, D]` queries and `[S, M, D]` keys, in the query's dtype.

    `mask` is None or broadcasts to the matrix. At most two matrices of the wider dtype are alive at once; what
    `sliced.bytes_per_slice` counts is this function.
    """
    dtype = query.dtype
    if attn.upcast_attention:
        query, key = query.float(), key.float()
    # With beta=0 the first operand is never read. The scale goes into the product's fp32 accumulator, unrounded.
    bias = query.new_empty(1, 1, 1) if mask is None else mask.to(query.dtype)
    scores = torch.baddbmm(bias, query, key.transpose(1, 2), beta=0 if mask is None else 1, alpha=attn.scale)
    del query, key, bias
    if attn.upcast_softmax:
        scores = scores.float()
    scores = scores.softmax(dim=-1)
    return scores.to(dtype)
