"""Keys and values of the prompt, projected once a call of the pipeline instead of at every step.

Before a network runs, the prompt is sent through the key and value projections of all its cross-attention layers, and
what they give, side by side, takes the prompt's place as `encoder_hidden_states`; each projection then only cuts its
own stripe out. So nothing is hidden from graphs and compilers: to them it is an ordinary input, the same tensor at
every step. Where the network is under graphs, the projections are one as well.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..attention import attention_modules, layer_kind, why_kept
from ..errors import NotSupportedError, explain_failure
from ..graphs.watch import why_not_capturable
from ..modules import has_own_forward
from ..planning.options import PromptProjections
from .ahead import AheadCall, ComputesAhead
from .components import require_plain_weights, unet_and_controlnets
from .stripes import Stripe, side_by_side
from .undo import Journal, journaling

TRIED = "enable_prompt_projections()"

NETWORKS = ("UNet2DConditionModel", "ControlNetModel")
"""Networks that hand `encoder_hidden_states` to their cross-attention layers as it is."""

PROJECTIONS = ("to_k", "to_v", "to_kv")
"""What a layer may send the prompt through; `to_kv` is the first two, fused."""


class PromptCall(AheadCall):
    """Stands over the call of a UNet or ControlNet and projects the prompt ahead."""

    def find(self) -> list[Any]:
        """Return the `Attention` layers that attend to the prompt."""
        return [attn for attn in attention_modules(self.root) if attn.is_cross_attention]

    def carriers(self) -> list[nn.Module]:
        """Return the modules that project the prompt now."""
        found = [attn._modules.get(name) for attn in self.layers for name in PROJECTIONS]
        return [module for module in found if module is not None]

    def width(self) -> int:
        """Keys and values of all layers; one more where the prompt is as wide, and could be taken for them."""
        width: int = sum(2 * attn.inner_kv_dim for attn in self.layers)
        return width + int(width == self.layers[0].cross_attention_dim)

    def lay(self) -> None:
        """Give each projection its stripe."""
        width, start = self.width(), 0
        for attn in self.layers:
            middle, stop = start + attn.inner_kv_dim, start + 2 * attn.inner_kv_dim
            for name, cut in zip(PROJECTIONS, [(start, middle), (middle, stop), (start, stop)], strict=True):
                if (module := getattr(attn, name, None)) is not None:
                    self.forwards.lay(Stripe(module, width, *cut))
            start = stop

    def replaced(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Put the projected prompt, `[B, M, width]`, in place of the prompt `[B, M, C]`."""
        if kwargs.get("cross_attention_kwargs"):
            return args, kwargs  # such as a LoRA's scale, which holds inside the network only
        if len(args) > 2:
            return (*args[:2], self._ahead(args[2]), *args[3:]), kwargs
        return args, {**kwargs, "encoder_hidden_states": self._ahead(kwargs.get("encoder_hidden_states"))}

    def _ahead(self, prompt: Any) -> Any:
        if not isinstance(prompt, Tensor) or prompt.is_inference():
            return prompt  # the changes of an inference tensor can't be noticed
        return self.once(prompt)

    def compute(self, *inputs: Tensor, **how: Any) -> Tensor:
        """Project the prompt `[B, M, C]` for all layers, `[B, M, width]`."""
        (prompt,) = inputs
        parts = [part for attn in self.layers for part in (attn.to_k(prompt), attn.to_v(prompt))]
        return side_by_side(parts, self.width())

    def why_not(self, carriers: list[nn.Module], fresh: bool) -> str | None:
        """Return why this network's prompt can't be projected ahead."""
        name, config = type(self.root).__name__, getattr(self.root, "config", None)
        if name not in NETWORKS:
            return f"what a {name} does with its prompt is not known"
        if not has_own_forward(self.root):
            return f"the forward of {name} was replaced (a trace, an export), which was made for the prompt itself"
        if getattr(self.root, "encoder_hid_proj", None) is not None:
            return f"{name} sends its prompt through encoder_hid_proj first (an IP-Adapter, say)"
        if getattr(config, "addition_embed_type", None) not in (None, "text_time"):
            return f"{name} adds its prompt to the time embedding"
        if not carriers:
            return f"{name} has no cross-attention"
        for attn in self.layers:
            if layer_kind(attn) != "plain" or attn.norm_cross is not None:
                return "a cross-attention layer has added keys, or normalises the prompt"
            if reason := why_kept(attn.processor, "plain"):
                return reason
        if fresh and any("forward" in vars(module) for module in carriers):
            return "a projection's forward was replaced"
        return why_not_capturable(*carriers)


def apply(pipe: Any, options: PromptProjections) -> Journal:
    """Exact: project keys and values of the prompt once a call, for the UNet and its ControlNets."""
    require_plain_weights(pipe, TRIED)
    with journaling() as journal:
        for index, network in enumerate(unet_and_controlnets(pipe, TRIED)):
            change = ComputesAhead(network, kind=PromptCall)
            change.install()
            journal.add(change)
            journal.scopes.append(change)
            reason = change.call.prepare()
            if reason and index == 0:
                needed, do = "a UNet whose cross-attention layers take the prompt as it comes", "leave this switch off"
                raise NotSupportedError(explain_failure(TRIED, reason, needed, do))
            what = reason or f"{len(change.call.layers)} cross-attention layers"
            journal.note(f"{type(network).__name__}: {what}")
    return journal
