"""PyTorch's scaled dot product attention, its kernel chosen by PyTorch or by name."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from .base import TurboAttnProcessor


class SDPAAttnProcessor(TurboAttnProcessor):
    """`F.scaled_dot_product_attention`, the fastest exact attention PyTorch brings along."""

    def __init__(self, backend: str = "auto") -> None:
        self.backend = backend

    def attend(self, attn: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=attn.scale)
