"""Facts and a request in, a plan out. The story: settle the size, climb the memory ladder, explain every switch.

situation = settle(facts, device, request)
for each rung of the memory ladder, the least intrusive first:
    the switches for speed that go with it, and the estimate of both
the exact rung that fits and adds the least time wins, then the lossy ones; if none fits, the thriftiest
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import ceil
from typing import TYPE_CHECKING, Any

from ..errors import NotSupportedError, explain_failure
from .conflicts import in_order
from .estimate import Estimates, MemoryEstimate
from .fitting import judge_fallback, judge_memory
from .ladder import Estimated, Rung, cheapest, make_ladder
from .memory import LOOPED_ROLES, estimate_memory, holds_scores
from .options import Options, PartialOffload, SDPAAttention, SlicedAttention, XFormersAttention
from .plan import Alternative, Plan, Rejected, Step, call_text
from .request import Request, Situation, Verdict, settle
from .speed import (
    judge_attention,
    judge_compile,
    judge_exported,
    judge_layout,
    judge_precision,
    judge_projections,
    judge_tf32,
    judge_trace,
    running_dtype,
    sm_text,
)
from .tiers import Tier, judge_tier, settle_tier
from .timing import (
    STEPS,
    added_seconds,
    denoiser_calls,
    missed_seconds,
    moves_weights,
    slicing_seconds,
    tiling_seconds,
)
from .units import gib

if TYPE_CHECKING:
    from ..facts.device import DeviceFacts
    from ..facts.pipeline import PipelineFacts


def plan(
    pipe: Any,
    facts: DeviceFacts,
    *,
    height: int | None = None,
    width: int | None = None,
    batch_size: int = 1,
    steps: int = STEPS,
    images: int | None = None,
    vram_budget: int | str | None = None,
    dtype: str = "keep",
    exact: bool = False,
    tier: str | None = None,
    cache_dir: bool | str | os.PathLike[str] | None = None,
    estimates: Estimates = estimate_memory,
) -> Plan:
    """Decide what to switch on for this pipeline on this device. Nothing is switched on and nothing is computed.

    Args:
        pipe: a diffusers pipeline, or its `PipelineFacts`.
        facts: the device's facts, from `probe()` or `DeviceFacts.card("RTX 3060")`.
        height, width: pixels; by default the model's own.
        batch_size: pictures per call.
        steps: denoising steps of a call: the fewer, the less offload by layers costs beside offload by models.
        images: how many pictures will be made in all; decides whether compiling pays.
        vram_budget: bytes, or text such as "6GB"; by default what is free.
        dtype: "keep", "auto" (half precision where it is safe), or a name such as "float16". A change is lossy.
        exact: allow exact switches only.
        tier: "instant" (CUDA graphs and all that goes with them, a first picture in seconds), "compiled" (torch.compile
            under the graphs), "fastest" (one of the two, by `images`) or "none". Left out, it is "fastest" for models
            it was measured with (SD1.5, SD2.1, SDXL in half precision), and none for others.
        cache_dir: where code that the plan compiles is kept, so that the next process finds it: True for the user's
            folder of caches, or a folder; see `compile_unet`.
        estimates: who says what a choice of switches needs: by default a closed form of the facts; `Predictor(pipe,
            device=facts).estimate` runs the pipeline's networks on the meta device.

    Raises:
        NotSupportedError: no pipeline, one without a denoiser, or a torch that has no kernels for the card.
        InvalidOptionError: an argument is outside what is accepted.
    """
    from ..facts.pipeline import PipelineFacts, read_pipeline

    request = Request(
        height=height,
        width=width,
        batch_size=batch_size,
        steps=steps,
        images=images,
        vram_budget=vram_budget,
        dtype=dtype,
        exact=exact,
        tier=tier,
        cache_dir=cache_dir,  # type: ignore[arg-type]
    )
    return make_plan(pipe if isinstance(pipe, PipelineFacts) else read_pipeline(pipe), facts, request, estimates)


def make_plan(
    pipeline_facts: PipelineFacts,
    device_facts: DeviceFacts,
    request: Request,
    estimates: Estimates = estimate_memory,
) -> Plan:
    """Decide from facts alone; see `plan`. Every action appears once, among the steps or among the rejected.

    Raises:
        NotSupportedError: torch can't use the device.
        InvalidOptionError: the size is no multiple of what the model needs.
    """
    if refusal := device_facts.refusals.get("torch"):
        raise NotSupportedError(
            explain_failure(
                f"plan() for {device_facts.name}",
                refusal,
                "a torch build with kernels for this device",
                "install the torch build that its notes name for this card, or plan for the CPU with probe('cpu')",
            )
        )
    situation = settle(pipeline_facts, device_facts, request)
    usable = situation.usable_bytes
    drafts: list[_Draft] = []
    tried: list[Estimated] = []
    for rung in _ladder(situation):
        fitting = [item for item in tried if usable is not None and item.needed_bytes <= usable]
        if moves_weights(rung.options) and not rung.exact and any(item.exact for item in fitting):
            continue  # neither as exact as what fits, nor free
        # of those that fit, the ones with graphs if this rung has some
        alike = [item for item in fitting if rung.lean or not item.missed_seconds]
        if any(item.exact and item.rung.fineness < rung.fineness and not item.rung.crawls for item in alike):
            continue  # tiles are no use, or none so small
        if rung.slice_size and any(item.exact and item.added_seconds <= _at_least(situation, rung) for item in fitting):
            continue  # slices of this size cost more, whatever they make room for
        if rung.stints and any(item.rung.has(PartialOffload) and item.rung.borders == rung.borders for item in alike):
            continue  # nothing needs to be stinted of where one fits that does not
        if rung.streams and rung.lean and any(item.rung.streams and not item.rung.lean for item in fitting):
            continue  # graphs of what is streamed fit
        # where all of the denoiser has room, nothing is gained by streaming a part of it
        whole = any(item.moving_seconds == 0 or item.rung.has(PartialOffload) for item in alike)
        if usable is not None and rung.streams and not whole:
            drafts.append(_filled(situation, rung, estimates, usable))
        else:
            drafts.append(_draft(situation, rung, estimates))
        tried.append(drafts[-1].summary(situation))
    taken = cheapest(tried, usable)
    chosen = drafts[tried.index(taken)]
    verdicts = [*chosen.verdicts, *judge_memory(situation, tried, taken), judge_fallback(situation, taken)]
    return Plan(
        steps=_steps(verdicts),
        rejected=_rejected(verdicts),
        request={**asdict(request), "height": situation.height, "width": situation.width},
        facts=_summary(situation),
        before=estimates(pipeline_facts, situation.height, situation.width, request.batch_size),
        after=chosen.estimate,
        budget_bytes=usable,
        alternatives=_alternatives(drafts, tried, usable),
        notes=_notes(situation, chosen),
    )


_SHARES = 64
"""In parts of this size a plan says how much of the denoiser stays: finer than what is estimated."""

_LOOKS = 10
"""How often the estimate is asked for it at most."""


@dataclass(frozen=True, kw_only=True)
class _Draft:
    """A rung of the ladder with the switches for speed that go with it."""

    rung: Rung
    tier: Tier
    verdicts: tuple[Verdict, ...]
    estimate: MemoryEstimate

    def summary(self, situation: Situation) -> Estimated:
        facts, steps = situation.pipeline, situation.request.steps
        batch_size, options = situation.request.batch_size, self.rung.options
        missed = 0.0
        if self.tier.name is None and _has_tier(situation):
            missed = missed_seconds(facts, steps) * denoiser_calls(facts, options, batch_size)
        return Estimated(
            rung=self.rung,
            needed_bytes=self.estimate.needed_bytes,
            added_seconds=added_seconds(facts, options, steps, pixels=situation.pixels, batch_size=batch_size) + missed,
            missed_seconds=missed,
            tiling_seconds=tiling_seconds(facts, options, situation.pixels),
            slicing_seconds=slicing_seconds(facts, options, steps, batch_size),
        )


def _at_least(situation: Situation, rung: Rung) -> float:
    """Return the seconds that a rung adds if nothing is moved and graphs are there."""
    batch_size, steps = situation.request.batch_size, situation.request.steps
    tiles = tiling_seconds(situation.pipeline, rung.options, situation.pixels)
    return tiles + slicing_seconds(situation.pipeline, rung.options, steps, batch_size)


def _alternatives(
    drafts: Sequence[_Draft], tried: Sequence[Estimated], usable_bytes: int | None
) -> tuple[Alternative, ...]:
    return tuple(
        Alternative(
            switches=tuple(call_text(option.action, _plain(option)) for option in item.rung.options),
            lean=item.rung.lean,
            exact=item.exact,
            peak_bytes=draft.estimate.peak_bytes,
            needed_bytes=item.needed_bytes,
            added_seconds=item.added_seconds,
            fits=None if usable_bytes is None else item.needed_bytes <= usable_bytes,
        )
        for draft, item in zip(drafts, tried, strict=True)
    )


def _ladder(situation: Situation) -> list[Rung]:
    dtype = running_dtype(situation, judge_precision(situation))
    attention = [verdict.options for verdict in judge_attention(situation, dtype) if verdict.taken]
    holds = any(
        option == SDPAAttention(backend="math") for option in _attention_for_estimate(situation, dtype, attention)
    )
    return make_ladder(situation, attention_holds_scores=holds, has_tier=_has_tier(situation))


def _has_tier(situation: Situation) -> bool:
    """Whether the plan is of a tier, where memory allows."""
    return settle_tier(situation, (), lean=False).name is not None


def _draft(situation: Situation, rung: Rung, estimates: Estimates) -> _Draft:
    precision = judge_precision(situation)
    dtype = running_dtype(situation, precision)
    attention = judge_attention(situation, dtype)
    if rung.has(SlicedAttention):
        # one processor a layer: the slices take the place of whatever attention was chosen
        attention = [
            Verdict(options=item.options, taken=False, reason="Attention in slices takes its place, for memory.")
            if item.taken
            else item
            for item in attention
        ]
    projections = judge_projections(situation, rung.options)
    tier = settle_tier(situation, rung.options, lean=rung.lean)
    compiles = judge_compile(situation, rung.options, tier)
    compiled = any(item.taken for item in compiles if item.options.action != "compile_vae")
    layout = judge_layout(situation, dtype, compiled, tier, lean=rung.lean)
    verdicts = [precision, layout, projections, *attention, judge_tf32(situation, dtype), *compiles]
    verdicts += [judge_trace(situation), judge_exported(situation)]
    verdicts += judge_tier(situation, tier, rung.options, compiled=compiled)
    taken = [item.options for item in verdicts if item.taken]
    assumed = _attention_for_estimate(situation, dtype, [*taken, *rung.options])
    estimate = estimates(
        situation.pipeline,
        situation.height,
        situation.width,
        situation.request.batch_size,
        [*(option for option in taken if option.slot != "attention"), *rung.options, *assumed],
    )
    return _Draft(rung=rung, tier=tier, verdicts=tuple(verdicts), estimate=estimate)


def _filled(situation: Situation, rung: Rung, estimates: Estimates, usable: int) -> _Draft:
    """Draft a rung with its partial offload keeping all that fits of the denoiser.

    What stays leaves while other components work, unless it fits beside them without a higher peak.
    """
    whole = sum(part.parameter_bytes for part in situation.pipeline.components if part.role in LOOPED_ROLES)

    def keeping(share: int, *, leaves: bool) -> _Draft:
        filled = rung.keeping(whole * share // _SHARES, denoiser_leaves=leaves)
        return _draft(situation, filled, estimates)

    known = {0: keeping(0, leaves=True)}
    if known[0].estimate.needed_bytes > usable:
        return known[0]
    known[_SHARES] = keeping(_SHARES, leaves=True)
    needed = {share: draft.estimate.needed_bytes for share, draft in known.items()}
    fits, too_much = (_SHARES, _SHARES + 1) if needed[_SHARES] <= usable else (0, _SHARES)
    while too_much - fits > 1 and len(known) < _LOOKS:
        # what stays counts byte by byte once it decides the peak, and not before: a straight line, or the middle
        slope = (needed[too_much] - needed[fits]) / (too_much - fits)
        straight = too_much - ceil((needed[too_much] - usable) / slope)
        share = min(max(straight, fits + 1), too_much - 1) if len(known) % 2 == 0 else (fits + too_much) // 2
        known[share] = keeping(share, leaves=True)
        needed[share] = known[share].estimate.needed_bytes
        fits, too_much = (share, too_much) if needed[share] <= usable else (fits, share)
    staying = keeping(fits, leaves=False)
    return staying if staying.estimate.needed_bytes <= needed[fits] else known[fits]


def _attention_for_estimate(situation: Situation, dtype: str, taken: Sequence[Options]) -> list[Options]:
    """Return the attention the estimate has to assume: SDPA without a fused kernel holds the scores as naive does."""
    if any(isinstance(option, (SlicedAttention, XFormersAttention)) for option in taken):
        return [option for option in taken if isinstance(option, XFormersAttention)]
    names_sdpa = any(isinstance(option, SDPAAttention) for option in taken)
    if not names_sdpa and holds_scores(situation.pipeline.processors):
        return [SDPAAttention(backend="math")]
    return [SDPAAttention(backend="auto" if situation.device.fused_sdpa(dtype) else "math")]


def _steps(verdicts: Sequence[Verdict]) -> tuple[Step, ...]:
    reasons = {id(verdict.options): verdict.reason for verdict in verdicts}
    taken = in_order(verdict.options for verdict in verdicts if verdict.taken)
    return tuple(
        Step(action=item.action, options=_plain(item), reason=reasons[id(item)], exact=item.exact) for item in taken
    )


def _rejected(verdicts: Sequence[Verdict]) -> tuple[Rejected, ...]:
    reasons = {id(verdict.options): verdict.reason for verdict in verdicts}
    left = in_order(verdict.options for verdict in verdicts if not verdict.taken)
    return tuple(
        Rejected(action=item.action, options=_plain(item), reason=reasons[id(item)], exact=item.exact) for item in left
    )


def _plain(option: Options) -> dict[str, Any]:
    # lists, not tuples: what JSON gives back must be equal
    return {name: list(value) if isinstance(value, tuple) else value for name, value in option.as_dict().items()}


def _summary(situation: Situation) -> dict[str, Any]:
    facts, device = situation.pipeline, situation.device
    return {
        "pipeline": f"{facts.class_name} ({facts.family}, {facts.denoiser_facts.dtype})",
        "device": sm_text(device),
        "total_bytes": device.total_bytes,
        "free_bytes": device.free_bytes,
        "parameter_bytes": facts.parameter_bytes,
        "assumed": device.assumed,
    }


def _notes(situation: Situation, draft: _Draft) -> tuple[str, ...]:
    facts, usable, estimate = situation.pipeline, situation.usable_bytes, draft.estimate
    notes = list(situation.device.notes)
    if situation.request.tier is not None or draft.tier.name is not None:
        notes.append(f"{draft.tier.name or 'no'} tier: {draft.tier.reason}")
    if usable is not None and estimate.needed_bytes > usable:
        notes.append(
            f"nothing known fits: the {estimate.peak.stage} stage needs {gib(estimate.needed_bytes)} with margin, "
            f"{gib(usable)} are usable; a smaller size or batch would help"
            + (", or exact=False, which allows VAE tiling" if situation.request.exact else "")
        )
    if facts.vae is not None and facts.vae.force_upcast and estimate.peak.stage == "decode":
        notes.append("this VAE decodes in float32 (force_upcast), which makes the decode the peak")
    dtype = facts.denoiser_facts.dtype
    if trouble := situation.device.refusals.get({"float16": "fp16", "bfloat16": "bf16"}.get(dtype, "")):
        notes.append(f"the weights are {dtype}, but {trouble}: load the pipeline in another dtype")
    if facts.refusals:
        notes.append(f"left as they are: {'; '.join(facts.refusals)}")
    return tuple(notes)
