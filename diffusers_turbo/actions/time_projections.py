"""Time embeddings and their projections, made for all steps at once, once a call of the pipeline.

Every resnet of a UNet projects the same time embedding, at every step, for a few microseconds of work each. All of them
depend on the timesteps alone (in SDXL also on the pooled prompt and the sizes), which are known when the first step
begins. The table that is made then has a row a step; a row goes in as `timestep_cond`, passes the embedding and the
activations untouched, and each resnet's projection cuts its own stripe out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..errors import NotSupportedError, explain_failure
from ..graphs.watch import why_not_capturable
from ..modules import has_own_forward, modules_in
from ..planning.options import TimeProjections
from ..schedulers.host_index import view_index
from .ahead import AheadCall, ComputesAhead
from .components import denoiser_of, require_plain_weights
from .stripes import Ahead, Stripe, side_by_side
from .undo import Journal, journaling

TRIED = "enable_time_projections()"

ADDED = ("text_embeds", "time_ids")
"""What SDXL's UNet embeds beside its time, of the call's `added_cond_kwargs`."""


@dataclass(eq=False)
class EmbeddedAhead(Ahead):
    """The forward of `time_embedding`: a condition as wide as a row of the table is that row."""

    def __call__(self, sample: Tensor, condition: Tensor | None = None) -> Any:
        """Return the row `[B, width]`, or the embedding of `sample`."""
        if condition is not None and condition.shape[-1] == self.width:
            return condition
        return type(self.module).forward(self.module, sample, condition)


@dataclass(eq=False)
class AddedAhead(Ahead):
    """The forward of SDXL's `add_embedding`: an input without the pooled prompt is of a call whose row has it all."""

    def __call__(self, sample: Tensor, *args: Any) -> Any:
        """Return nothing to add, or the embedding of `[B, width]`."""
        if sample.shape[-1] != self.width:
            return sample.new_zeros(1, 1)
        return type(self.module).forward(self.module, sample, *args)


class TimeCall(AheadCall):
    """Stands over the UNet's call and hands it a row of the table in place of its timestep's embedding."""

    def find(self) -> list[Any]:
        """Return the blocks that project the time embedding."""
        return [module for module in modules_in(self.root) if module._modules.get("time_emb_proj") is not None]

    def carriers(self) -> list[nn.Module]:
        """Return the modules that embed and project the time now."""
        found = [self.root._modules.get(name) for name in ("time_embedding", "add_embedding")]
        found += [resnet._modules.get(name) for resnet in self.layers for name in ("nonlinearity", "time_emb_proj")]
        return [module for module in found if module is not None]

    def width(self) -> int:
        """All projections; one more where the embedding itself is as wide, and could be taken for them."""
        width: int = sum(resnet.time_emb_proj.out_features for resnet in self.layers)
        return width + int(width == self.layers[0].time_emb_proj.in_features)

    def lay(self) -> None:
        """Give embeddings, activations and projections their forwards."""
        root: Any = self.root
        width, start = self.width(), 0
        self.forwards.lay(EmbeddedAhead(root.time_embedding, width))
        if getattr(root, "add_embedding", None) is not None:
            self.forwards.lay(AddedAhead(root.add_embedding, root.add_embedding.linear_1.in_features))
        for resnet in self.layers:
            stop = start + resnet.time_emb_proj.out_features
            self.forwards.lay(Ahead(resnet.nonlinearity, width))
            self.forwards.lay(Stripe(resnet.time_emb_proj, width, start, stop))
            start = stop

    def replaced(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Give the row of this step's timestep as `timestep_cond`, where the timestep is one of the scheduler's."""
        root: Any = self.root
        given = dict(zip(("sample", "timestep"), args, strict=False)) | kwargs
        sample, added = given.get("sample"), given.get("added_cond_kwargs") or {}
        timesteps = getattr(getattr(self.pipe, "scheduler", None), "timesteps", None)
        index = view_index(timesteps, given.get("timestep"))
        if index is None or not isinstance(sample, Tensor):
            return args, kwargs
        if len(args) > 3 or kwargs.get("timestep_cond") is not None or kwargs.get("cross_attention_kwargs"):
            return args, kwargs
        needed = [timesteps, *(added.get(name) for name in ADDED if root.config.addition_embed_type)]
        inputs = [x for x in needed if isinstance(x, Tensor) and not x.is_inference()]
        if len(inputs) < len(needed):
            return args, kwargs  # the changes of inference tensors can't be noticed
        table = self.once(*inputs, dtype=sample.dtype, device=sample.device)
        kwargs = {**kwargs, "timestep_cond": table[index].expand(sample.shape[0], -1)}
        if len(inputs) > 1:  # the table has it all
            kwargs["added_cond_kwargs"] = {**added, "text_embeds": added["text_embeds"][:, :0]}
        return args, kwargs

    def compute(self, *inputs: Tensor, **how: Any) -> Tensor:
        """Embed and project the timesteps `[S]` of all steps, with what `ADDED` names: `[S, 1 or B, width]`."""
        root: Any = self.root
        timesteps, *added = inputs
        embedding = root.time_embedding(root.time_proj(timesteps.to(how["device"])).to(how["dtype"]))[:, None]
        if added:
            conditions = dict(zip(ADDED, added, strict=True))
            embedding = embedding + root.get_aug_embed(
                emb=embedding, encoder_hidden_states=None, added_cond_kwargs=conditions
            )
        parts = [resnet.time_emb_proj(resnet.nonlinearity(embedding)) for resnet in self.layers]
        return side_by_side(parts, self.width())

    def why_not(self, carriers: list[nn.Module], fresh: bool) -> str | None:
        """Return why this UNet's time can't be projected ahead."""
        name, config = type(self.root).__name__, getattr(self.root, "config", None)
        if name != "UNet2DConditionModel":
            return f"how a {name} embeds its time is not known"
        if not has_own_forward(self.root):
            return f"the forward of {name} was replaced (a trace, an export), which was made for the timestep itself"
        for option, known in (
            *(("class_embed_type", (None,)), ("num_class_embeds", (None,)), ("time_embedding_act_fn", (None,))),
            *(("time_cond_proj_dim", (None,)), ("addition_embed_type", (None, "text_time"))),
        ):
            if getattr(config, option, None) not in known:
                return f"{name} embeds more than its time ({option})"
        for resnet in self.layers:
            if type(resnet).__name__ != "ResnetBlock2D" or resnet.skip_time_act:
                return f"a {type(resnet).__name__} takes the time in a way of its own"
        if fresh and any("forward" in vars(module) for module in carriers):
            return "the forward of a projection or activation was replaced"
        return why_not_capturable(*carriers)


def apply(pipe: Any, options: TimeProjections) -> Journal:
    """Exact: embed and project the timesteps of all steps at once, before the first one."""
    require_plain_weights(pipe, TRIED)
    _, unet = denoiser_of(pipe, TRIED)
    with journaling() as journal:
        change = ComputesAhead(unet, kind=TimeCall)
        change.install()
        journal.add(change)
        journal.scopes.append(change)
        if reason := change.call.prepare():
            needed, do = "a UNet whose resnets project a plain time embedding", "leave this switch off"
            raise NotSupportedError(explain_failure(TRIED, reason, needed, do))
        journal.note(f"{len(change.call.layers)} projections a step come from one table a call")
    return journal
