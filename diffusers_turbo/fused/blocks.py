"""Two of diffusers' blocks in their plain case, which hand a norm what the host adds or applies around it.

Between a resnet's first convolution and its second norm the host adds bias and time embedding, after the second
convolution bias and residual, and between the parts of a transformer block the residual, each in a pass over memory of
its own. No seam leads there. So the plain case of each block has a formula here; whatever is not plain goes to the
host's own forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from .layers import (
    FusedConv,
    FusedForward,
    FusedGroupNorm,
    FusedLayerNorm,
    is_offloaded,
    stand_in,
    unwatched,
    without_bias,
)


@dataclass(eq=False)
class FusedBlock:
    """Stands in for the forward of a block; `kind` is its class, which others may exchange meanwhile (tomesd)."""

    module: Any
    kind: type

    def is_own_kind(self) -> bool:
        """Whether the block is of the class that it was replaced for."""
        return type(self.module) is self.kind

    def norms_are(self, expected: type[FusedForward], *norms: nn.Module) -> bool:
        """Whether the block is of its own class, and its norms take what is asked of them here, nobody looking on."""
        return self.is_own_kind() and all(isinstance(stand_in(norm), expected) and unwatched(norm) for norm in norms)


class FusedResnetBlock(FusedBlock):
    """`ResnetBlock2D`: SiLU, time embedding and the first bias go into the norms, the second bias into the residual."""

    def __call__(self, input_tensor: Tensor, temb: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """Run the block on `[B, C, H, W]` and a time embedding `[B, T]`."""
        block = self.module
        unusual = args or kwargs or block.training or (temb is not None) != (block.time_emb_proj is not None)
        if unusual or not self.is_own_kind():
            host_result: Tensor = type(block).forward(block, input_tensor, temb, *args, **kwargs)
            return host_result
        if isinstance(norm1 := stand_in(block.norm1), FusedGroupNorm):
            input_tensor = norm1.laid_out(input_tensor, block.conv1)
        add = None
        if temb is not None:
            add = block.time_emb_proj(temb if block.skip_time_act else block.nonlinearity(temb))
        hidden = self._activated(block.norm1, input_tensor)
        if isinstance(norm2 := stand_in(block.norm2), FusedGroupNorm) and norm2.takes_bias_of(block.conv1, hidden):
            hidden = block.norm2(without_bias(block.conv1, hidden), silu=True, add=add, before=block.conv1.bias)
        else:
            hidden = self._activated(block.norm2, block.conv1(hidden), add)
        hidden = block.dropout(hidden)
        shortcut = input_tensor if block.conv_shortcut is None else block.conv_shortcut(input_tensor)
        if isinstance(stand_in(block.conv2), FusedConv) and unwatched(block.conv2):
            result: Tensor = block.conv2(hidden, residual=shortcut)
        else:
            result = shortcut + block.conv2(hidden)
        return result if block.output_scale_factor == 1 else result / block.output_scale_factor

    def _activated(self, norm: nn.Module, x: Tensor, add: Tensor | None = None) -> Tensor:
        """Add `[B, C]`, normalise, apply SiLU: in one kernel where the norm is ours."""
        if isinstance(stand_in(norm), FusedGroupNorm):
            result: Tensor = norm(x, silu=True, add=add)
        else:
            result = self.module.nonlinearity(norm(x if add is None else x + add[:, :, None, None]))
        return result


@dataclass(eq=False)
class FusedTransformerBlock(FusedBlock):
    """`BasicTransformerBlock`: each residual is added in the pass that normalises the sum.

    Attributes:
        following: the block that is called next on what this one returns; its first norm is of this one's last sum.
    """

    following: Any = None
    _handed: tuple[Tensor, int, Tensor] | None = field(default=None, repr=False)

    def __call__(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Any = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Run the block on `[B, N, D]`; the arguments are the host's."""
        block, given = self.module, cross_attention_kwargs or {}
        handed, self._handed = self._handed, None
        unusual = block._chunk_size is not None or hidden_states.ndim != 3 or "gligen" in given
        if unusual or not self.norms_are(FusedLayerNorm, block.norm2, block.norm3):
            host_result: Tensor = type(block).forward(
                block,
                hidden_states,
                attention_mask,
                encoder_hidden_states,
                encoder_attention_mask,
                timestep,
                cross_attention_kwargs,
                class_labels,
                added_cond_kwargs,
            )
            return host_result
        attended = block.attn1(self._normed(hidden_states, handed), attention_mask=attention_mask, **given)
        hidden_states, normed = block.norm2(attended, residual=hidden_states)
        attended = block.attn2(
            normed, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask, **given
        )
        hidden_states, normed = block.norm3(attended, residual=hidden_states)
        return self._hand_on(block.ff(normed), hidden_states)

    def _normed(self, x: Tensor, handed: tuple[Tensor, int, Tensor] | None) -> Tensor:
        """Return the first norm of `[B, N, D]`: what the block before made, if this is its sum, and unchanged."""
        if handed is not None and handed[0] is x and handed[1] == x._version:
            return handed[2]
        result: Tensor = self.module.norm1(x)
        return result

    def _hand_on(self, x: Tensor, residual: Tensor) -> Tensor:
        """Add `[B, N, D]` to the residual, and in the same pass normalise the sum for the block that follows."""
        if _must_be_left(x) or self.following is None:
            return x + residual
        ahead = stand_in(self.following)
        if not isinstance(ahead, FusedTransformerBlock) or not ahead.is_own_kind():
            return x + residual
        if not isinstance(stand_in(self.following.norm1), FusedLayerNorm) or not _is_here(self.following, x.device):
            return x + residual
        added, normed = self.following.norm1(x, residual=residual)
        ahead._handed = added, added._version, normed
        result: Tensor = added
        return result


def _is_here(block: Any, device: torch.device) -> bool:
    """Whether a block's first norm may be called before the block: nobody looks on, or has its weights to bring."""
    norm = block.norm1
    if not unwatched(norm) or is_offloaded(block) or is_offloaded(norm):
        return False
    return all(weight is None or weight.device == device for weight in (norm.weight, norm.bias))


def _must_be_left(x: Tensor) -> bool:
    """Whether a compiler looks on, a gradient is recorded, or nobody counts the changes of a tensor."""
    return torch.compiler.is_compiling() or torch.is_grad_enabled() or x.is_inference()


def resnet_reasons(block: Any) -> list[str]:
    """Why a `ResnetBlock2D` is not the plain case; empty when it is."""
    reasons = []
    if block.upsample is not None or block.downsample is not None:
        reasons.append("a resnet that samples up or down after its first norm")
    if block.time_embedding_norm == "scale_shift":
        reasons.append("a resnet whose time embedding scales as well as shifts")
    if type(block.nonlinearity) is not nn.SiLU:
        reasons.append(f"a resnet whose activation is {type(block.nonlinearity).__name__}")
    if any(type(norm) is not nn.GroupNorm for norm in (block.norm1, block.norm2)):
        reasons.append("a resnet whose norms are not both nn.GroupNorm")
    return reasons


def transformer_reasons(block: Any) -> list[str]:
    """Why a `BasicTransformerBlock` is not the plain case; empty when it is."""
    reasons = []
    if block.norm_type != "layer_norm":
        reasons.append(f"a transformer block with norms of kind {block.norm_type}")
    if block.attn2 is None or block.only_cross_attention:
        reasons.append("a transformer block without self- and then cross-attention")
    if block.pos_embed is not None:
        reasons.append("a transformer block that adds positions to its norms")
    if any(type(norm) is not nn.LayerNorm for norm in (block.norm2, getattr(block, "norm3", None))):
        reasons.append("a transformer block whose norms are not nn.LayerNorm")
    return reasons


def successors(parent: Any) -> Iterator[tuple[Any, Any]]:
    """Yield blocks of a transformer of which the second is called on what the first returns."""
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    if type(parent) is not Transformer2DModel:
        return
    for before, after in pairwise(parent.transformer_blocks):
        plain = (type(x) is BasicTransformerBlock and not transformer_reasons(x) for x in (before, after))
        if all(plain) and type(after.norm1) is nn.LayerNorm:
            yield before, after
