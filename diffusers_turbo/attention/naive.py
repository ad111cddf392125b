"""The reference processor: the attention matrix written out, as the formula has it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .base import TurboAttnProcessor


class NaiveAttnProcessor(TurboAttnProcessor):
    """Softmax(Q K^T * scale + mask) V with the whole `[B, H, N, M]` matrix in memory; slow, and the measure of the rest.

    `upcast_attention` takes the scores in fp32, `upcast_softmax` the softmax, as diffusers' `AttnProcessor` does.
    """

    def attend(self, attn: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        if attn.upcast_attention:
            query, key = query.float(), key.float()
        scores = (query * attn.scale) @ key.transpose(-1, -2)
        if mask is not None:
            scores = scores + mask
        if attn.upcast_softmax:
            scores = scores.float()
        return scores.softmax(dim=-1).to(value.dtype) @ value
