"""One form for every mask that diffusers' attention layers are given."""

from __future__ import annotations

import torch
from torch import Tensor

from diffusers_turbo.errors import InvalidOptionError, explain_failure


def attention_bias(mask: Tensor, batch: int, heads: int, n_query: int, n_key: int, dtype: torch.dtype) -> Tensor:
    """Any mask diffusers' layers accept as a bias `[B or 1, H or 1, N or 1, M]` of `dtype`.

    Accepted: `[B, M]`, `[B, 1 or N, M]`, `[B*H, 1 or N, M]` (already repeated over heads) and `[B, 1 or H, 1 or N, M]`,
    with 1 in place of B everywhere. A boolean mask keeps the True positions, any other is added to the scores.

    Raises:
        InvalidOptionError: for any other shape.

    >>> attention_bias(torch.tensor([[True, False]]), 1, 8, 4, 2, torch.float32)
    tensor([[[[0., -inf]]]])
    """
    shape = list(mask.shape)
    if mask.ndim == 2:
        mask = mask[:, None, None, :]
    elif mask.ndim == 3 and shape[0] == batch * heads:
        mask = mask.reshape(batch, heads, *shape[1:])
    elif mask.ndim == 3:
        mask = mask[:, None]
    allowed = ((1, batch), (1, heads), (1, n_query), (n_key,))
    if mask.ndim != 4 or any(size not in sizes for size, sizes in zip(mask.shape, allowed, strict=True)):
        raise InvalidOptionError(
            explain_failure(
                "attention with a mask",
                f"a mask of shape {shape} for B={batch}, H={heads}, N={n_query} queries and M={n_key} keys",
                "[B, M], [B, 1 or N, M], [B*H, 1 or N, M] or [B, 1 or H, 1 or N, M]",
                "pass a mask as long as the keys",
            )
        )
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, float("-inf"))
    if mask.dtype == dtype:
        return mask
    # The lowest fp32 number would become -inf in fp16, and a row of nothing else would become NaN.
    return mask.clamp(min=torch.finfo(dtype).min).to(dtype)
