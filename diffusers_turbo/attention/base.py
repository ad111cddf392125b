"""The contract every attention processor here keeps: project, attend, project back.

diffusers gives each `Attention` layer a processor object and calls it with the layer and its inputs. What a layer needs
around the attention itself (norms, masks, added keys, residual) is the same whatever computes the attention, so it
stands here once; a subclass only says how `[B, H, N, D]` queries meet keys and values.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .limits import AttentionLayer, Limits, layer_kind, reasons_against
from .masks import attention_bias


@dataclass(frozen=True)
class Tolerance:
    """How far results may lie from the fp32 reference: largest difference over largest magnitude of the reference."""

    output: float
    gradient: float


class TurboAttnProcessor(ABC):
    """Base of all processors: everything around `attend`, for plain, added-KV and joint layers.

    An instance holds options only, never a tensor: one may serve every layer of a model, be pickled, copied, compared.
    Every subclass can be made without arguments, because `load_ip_adapter` does so.

    Attributes:
        limits: what the kernel accepts, one entry a device where devices differ.
        tolerance: what its results keep to, by dtype.
    """

    limits: ClassVar[tuple[Limits, ...]]
    tolerance: ClassVar[dict[torch.dtype, Tolerance]] = {
        # About twice the most that tests/attention/test_shapes.py sees, rounding of the projections included.
        torch.float32: Tolerance(output=1e-5, gradient=1e-5),
        torch.float16: Tolerance(output=2e-3, gradient=4e-3),
        torch.bfloat16: Tolerance(output=1.5e-2, gradient=2e-2),
    }

    def reasons(self, layer: AttentionLayer) -> list[str]:
        """Why this processor cannot take `layer`, judged by its limits alone; empty when it can. Asks no device."""
        return reasons_against(self.limits, layer)

    def reasons_here(self, layer: AttentionLayer) -> list[str]:
        """`reasons`, and when there are none, what a real call of the kernel on the layer's device says."""
        return self.reasons(layer)

    @abstractmethod
    def attend(self, attn: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Attention of `[B, H, N, D]` queries over `[B, H, M, D]` keys and values, scores scaled by `attn.scale`.

        `mask` is added to the scaled scores: None or a float tensor `[B or 1, H or 1, N or 1, M]` of the query's dtype.
        """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Run one layer. Further arguments are accepted and ignored, as diffusers' own processors do.

        Args:
            attn: the `diffusers.models.attention_processor.Attention` layer being run.
            hidden_states: `[B, N, C]`, or an image `[B, C, height, width]`.
            encoder_hidden_states: `[B, M, C']`, or None for self-attention.
            attention_mask: added to the scores (or boolean, True = attend); see `attention_bias`.
            temb: what the layer's spatial norm is conditioned on.

        Returns:
            A tensor shaped like `hidden_states`; for joint layers (SD3) the pair of image and text states.
        """
        kind = layer_kind(attn)
        if kind == "joint":
            return self._joint(attn, hidden_states, encoder_hidden_states, attention_mask)
        if kind == "added_kv":
            return self._added_kv(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        return self._plain(attn, hidden_states, encoder_hidden_states, attention_mask, temb)

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and vars(other) == vars(self)

    def __hash__(self) -> int:
        return hash((type(self), tuple(sorted((name, repr(value)) for name, value in vars(self).items()))))

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({options})"

    def _plain(
        self, attn: Any, hidden_states: Tensor, context: Tensor | None, mask: Tensor | None, temb: Tensor | None
    ) -> Tensor:
        """Self- or cross-attention, the layers of SD, SDXL, PixArt and the VAE."""
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        is_image = hidden_states.ndim == 4
        if is_image:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        if context is not None and attn.norm_cross is not None:
            context = attn.norm_encoder_hidden_states(context)

        query, key, value = project(attn, hidden_states, context)
        query, key = normed(query, attn.norm_q), normed(key, attn.norm_k)
        hidden_states = leave_heads(self._attend(attn, query, key, value, mask))
        hidden_states = attn.to_out[1](attn.to_out[0](hidden_states))

        if is_image:
            hidden_states = hidden_states.transpose(1, 2).reshape(residual.shape)
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        # Dividing by one changes no bit and costs a pass over memory.
        return hidden_states if attn.rescale_output_factor == 1 else hidden_states / attn.rescale_output_factor

    def _added_kv(
        self, attn: Any, hidden_states: Tensor, context: Tensor | None, mask: Tensor | None, temb: Tensor | None
    ) -> Tensor:
        """Attention over the context's own projections and then the layer's, the layers of UnCLIP and Kandinsky.

        The input is channels-first, the residual is always added, and without a context the states stand in for it as
        they were before the group norm.
        """
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if context is None:
            context = hidden_states
        elif attn.norm_cross is not None:
            context = attn.norm_encoder_hidden_states(context)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)

        query = attn.to_q(hidden_states)
        key, value = attn.add_k_proj(context), attn.add_v_proj(context)
        if not attn.only_cross_attention:
            key = torch.cat([key, attn.to_k(hidden_states)], dim=1)
            value = torch.cat([value, attn.to_v(hidden_states)], dim=1)
            if mask is not None and mask.shape[-1] == context.shape[1]:
                # A mask of the context leaves the layer's own tokens visible.
                mask = F.pad(mask, (0, hidden_states.shape[1]), value=True if mask.dtype == torch.bool else 0.0)
        query, key, value = enter_heads(attn, query, key, value)
        hidden_states = leave_heads(self._attend(attn, query, key, value, mask))
        hidden_states = attn.to_out[1](attn.to_out[0](hidden_states))
        return hidden_states.transpose(1, 2).reshape(residual.shape) + residual

    def _joint(self, attn: Any, hidden_states: Tensor, context: Tensor | None, mask: Tensor | None) -> Any:
        """One attention over image and then text tokens, each with its own projections and norms: the layers of SD3."""
        query, key, value = project(attn, hidden_states, None)
        query, key = normed(query, attn.norm_q), normed(key, attn.norm_k)
        if context is not None:
            added_query, added_key, added_value = project_added(attn, context)
            query = torch.cat([query, normed(added_query, attn.norm_added_q)], dim=2)
            key = torch.cat([key, normed(added_key, attn.norm_added_k)], dim=2)
            value = torch.cat([value, added_value], dim=2)
        joined = leave_heads(self._attend(attn, query, key, value, mask))

        n_image = hidden_states.shape[1]
        hidden_states = attn.to_out[1](attn.to_out[0](joined[:, :n_image]))
        if context is None:
            return hidden_states
        context = joined[:, n_image:]
        return hidden_states, context if attn.context_pre_only else attn.to_add_out(context)

    def _attend(self, attn: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        batch, heads, n_query, _ = query.shape
        if key.shape[1] != heads:
            key = key.repeat_interleave(heads // key.shape[1], dim=1)
            value = value.repeat_interleave(heads // value.shape[1], dim=1)
        if mask is not None:
            mask = attention_bias(mask, batch, heads, n_query, key.shape[2], query.dtype)
        return self.attend(attn, query, key, value, mask)


def project(attn: Any, hidden_states: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as `[B, H, N, D]`, by the layer's fused projections where they are in force.

    Fused weights are used only while the three projections are plain linear layers, so that an adapter wrapped around
    one of them (LoRA) is never bypassed, and not while one of these learns.
    """
    fused = attn.fused_projections and _may_fuse(attn.to_q, attn.to_k, attn.to_v)
    if fused and context is None and not attn.is_cross_attention:
        sizes = [attn.inner_dim, attn.inner_kv_dim, attn.inner_kv_dim]
        return enter_heads(attn, *attn.to_qkv(hidden_states).split(sizes, dim=-1))
    source = hidden_states if context is None else context
    if fused and attn.is_cross_attention:
        key, value = attn.to_kv(source).split(attn.inner_kv_dim, dim=-1)
    else:
        key, value = attn.to_k(source), attn.to_v(source)
    return enter_heads(attn, attn.to_q(hidden_states), key, value)


def project_added(attn: Any, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`project` for the text tokens of a joint layer, which have projections of their own."""
    if attn.fused_projections and _may_fuse(attn.add_q_proj, attn.add_k_proj, attn.add_v_proj):
        sizes = [attn.inner_dim, attn.inner_kv_dim, attn.inner_kv_dim]
        return enter_heads(attn, *attn.to_added_qkv(context).split(sizes, dim=-1))
    return enter_heads(attn, attn.add_q_proj(context), attn.add_k_proj(context), attn.add_v_proj(context))


def _may_fuse(*projections: Any) -> bool:
    return are_plain(*projections) and not needs_grad(*(projection.weight for projection in projections))


def are_plain(*projections: nn.Module | None) -> bool:
    """Whether every projection is torch's own linear layer, with no adapter around it."""
    return all(type(projection) is nn.Linear for projection in projections)


def normed(states: Tensor, norm: nn.Module | None) -> Tensor:
    """`[B, H, N, D]` through a norm over D, in the dtype they came in; a norm with fp32 weights widens it."""
    return states if norm is None else norm(states).to(states.dtype)


def enter_heads(attn: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """View `[B, N, H*D]` as `[B, H, N, D]`; keys and values may have fewer heads."""
    head_dim = query.shape[-1] // attn.heads
    query, key, value = (x.reshape(*x.shape[:2], -1, head_dim).transpose(1, 2) for x in (query, key, value))
    return query, key, value


def leave_heads(states: Tensor) -> Tensor:
    """`[B, H, N, D]` back to `[B, N, H*D]`."""
    return states.transpose(1, 2).flatten(2)


def needs_grad(*states: Tensor) -> bool:
    """Whether autograd is recording and any of these takes part."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in states)
