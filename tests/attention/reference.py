"""What an attention layer computes, written from its definition in fp32 with plain torch operations.

Shares no code with the package or with diffusers: neither their processors nor `Attention`'s helpers are called.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F


def reference(
    attn: Any,
    hidden: torch.Tensor,
    context: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    temb: torch.Tensor | None = None,
) -> torch.Tensor:
    """The output of a plain `Attention` layer; `bias` broadcasts to `[B, H, N, M]`, the layer is in fp32."""
    residual = hidden
    if attn.spatial_norm is not None:
        hidden = attn.spatial_norm(hidden, temb)
    image = hidden.ndim == 4
    if image:
        hidden = torch.einsum("bcn->bnc", hidden.flatten(2))
    if attn.group_norm is not None:
        hidden = channels_last(attn.group_norm, hidden)
    keys_from = hidden
    if context is not None:
        keys_from = context
        if isinstance(attn.norm_cross, torch.nn.LayerNorm):
            keys_from = attn.norm_cross(context)
        elif attn.norm_cross is not None:
            keys_from = channels_last(attn.norm_cross, context)

    query = heads_of(linear(attn.to_q, hidden), attn.heads)
    key = heads_of(linear(attn.to_k, keys_from), attn.inner_kv_dim // query.shape[-1])
    value = heads_of(linear(attn.to_v, keys_from), attn.inner_kv_dim // query.shape[-1])
    if attn.norm_q is not None:
        query, key = attn.norm_q(query), attn.norm_k(key)
    groups = attn.heads // key.shape[1]
    key, value = (torch.stack([x] * groups, dim=2).flatten(1, 2) for x in (key, value))
    output = linear(attn.to_out[0], attention(query, key, value, attn.scale, bias))

    if image:
        output = torch.einsum("bnc->bcn", output).reshape(residual.shape)
    if attn.residual_connection:
        output = output + residual
    return output / attn.rescale_output_factor


def added_kv_reference(
    attn: Any, hidden: torch.Tensor, context: torch.Tensor | None = None, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The output of a layer with added keys and values, for `[B, C, ...]` states."""
    tokens = torch.einsum("bcn->bnc", hidden.flatten(2))
    context = tokens if context is None else context
    if attn.norm_cross is not None and context is not tokens:
        context = channels_last(attn.norm_cross, context)
    tokens = channels_last(attn.group_norm, tokens)
    query = heads_of(linear(attn.to_q, tokens), attn.heads)
    key = heads_of(linear(attn.add_k_proj, context), attn.heads)
    value = heads_of(linear(attn.add_v_proj, context), attn.heads)
    if not attn.only_cross_attention:
        key = torch.cat([key, heads_of(linear(attn.to_k, tokens), attn.heads)], dim=2)
        value = torch.cat([value, heads_of(linear(attn.to_v, tokens), attn.heads)], dim=2)
    output = linear(attn.to_out[0], attention(query, key, value, attn.scale, bias))
    return torch.einsum("bnc->bcn", output).reshape(hidden.shape) + hidden


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`[B, H, N, D]`, `[B, H, M, D]` twice -> `[B, N, H*D]`."""
    scores = torch.einsum("bhnd,bhmd->bhnm", query, key) * scale
    if bias is not None:
        scores = scores + bias
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    weights = weights / weights.sum(-1, keepdim=True)
    return torch.einsum("bhnm,bhmd->bnhd", weights, value).flatten(2)


def linear(projection: Any, states: torch.Tensor) -> torch.Tensor:
    return F.linear(states, projection.weight, projection.bias)


def heads_of(states: torch.Tensor, heads: int) -> torch.Tensor:
    return torch.einsum("bnhd->bhnd", states.unflatten(-1, (heads, -1)))


def channels_last(norm: Any, states: torch.Tensor) -> torch.Tensor:
    return torch.einsum("bcn->bnc", norm(torch.einsum("bnc->bcn", states)))


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference over largest magnitude of what is wanted, as `Tolerance` counts it."""
    assert found.shape == wanted.shape
    return ((found.double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp(min=1e-12)).item()
