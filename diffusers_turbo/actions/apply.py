"""From options to what applies them; and a whole plan, or nothing of it."""

from __future__ import annotations

from typing import Any

from ..planning import options as opt
from ..planning.options import Options
from ..planning.plan import Plan
from . import (
    attention,
    compiling,
    denoiser_slices,
    exporting,
    fused_kernels,
    graphs,
    guidance,
    layout,
    memory_fallback,
    offload,
    partial_offload,
    pointwise,
    precision,
    projections,
    prompt,
    scheduler,
    tf32,
    time_projections,
    tracing,
    vae,
    vae_upcast,
)
from .ledger import Apply, close_ledger, open_ledger
from .undo import Journal

APPLY: dict[type[Options], Apply] = {
    opt.NaiveAttention: attention.apply,
    opt.SDPAAttention: attention.apply,
    opt.XFormersAttention: attention.apply,
    opt.SlicedAttention: attention.apply,
    attention.FusedAttention: attention.apply,
    opt.FusedQKV: projections.apply,
    opt.ChannelsLast: layout.apply,
    opt.TF32: tf32.apply,
    opt.HalfPrecision: precision.apply,
    opt.VAESlicing: vae.apply_slicing,
    opt.VAETiling: vae.apply_tiling,
    opt.VAEExactTiling: vae.apply_exact_tiling,
    opt.VAEUpcastCopy: vae_upcast.apply,
    opt.FusedKernels: fused_kernels.apply,
    opt.ModelOffload: offload.apply_model,
    opt.SequentialOffload: offload.apply_sequential,
    opt.GroupOffload: offload.apply_group,
    opt.PartialOffload: partial_offload.apply,
    opt.MemoryFallback: memory_fallback.apply,
    opt.SyncFreeLoop: scheduler.apply,
    opt.CompileUNet: compiling.apply,
    opt.CompileTransformer: compiling.apply,
    opt.CompileVAE: compiling.apply,
    opt.TraceUNet: tracing.apply,
    opt.LoadExportedUNet: exporting.apply,
    opt.CUDAGraphs: graphs.apply,
    opt.DenoiserSlicing: denoiser_slices.apply,
    opt.PointwiseMatmul: pointwise.apply,
    opt.PromptProjections: prompt.apply,
    opt.SharedGuidance: guidance.apply,
    opt.TimeProjections: time_projections.apply,
}
"""The function behind each kind of options."""


def apply_options(pipe: Any, options: Options) -> Journal:
    """Apply one action and return the journal that undoes it."""
    return APPLY[type(options)](pipe, options)


def apply_plan(pipe: Any, plan: Plan) -> None:
    """Apply every step of a plan; if one fails, the stacks of levers are as they were, and the error goes on."""
    ledger = open_ledger(pipe)
    before = {slot: list(stack) for slot, stack in ledger.slots.items()}
    try:
        for step in plan.steps:
            getattr(pipe, step.action)(**step.options)
    except BaseException:
        ledger = open_ledger(pipe)
        for slot in [*ledger.slots, *before]:
            ledger.rearrange(pipe, slot, before.get(slot, []))
        close_ledger(pipe)
        raise
