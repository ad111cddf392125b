"""Which switches exclude each other, in which order the rest go, and why: data, and two functions that read it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .options import (
    CompileTransformer,
    CompileUNet,
    CompileVAE,
    CUDAGraphs,
    DenoiserSlicing,
    FusedQKV,
    GroupOffload,
    LoadExportedUNet,
    ModelOffload,
    Options,
    PartialOffload,
    PromptProjections,
    SequentialOffload,
    SharedGuidance,
    TimeProjections,
    TraceUNet,
    VAEExactTiling,
    VAETiling,
    VAEUpcastCopy,
)

SLOT_ORDER: dict[str, str] = {
    "precision": "first: every later switch sees the weights as they will be",
    "layout": "after precision: a cast makes new tensors, which would lose their strides",
    "pointwise": "after layout, which it asks for",
    "projections": "before attention: the processors ask a layer whether its projections are fused",
    "attention": "after the weights are final, so that kernels are chosen for the dtype that runs",
    "tf32": "a setting of the call, independent of the modules",
    "vae_slicing": "before tiling, which then works on single pictures",
    "vae_tiling": "before offload and compile, which see the decoder that really runs",
    "vae_upcast": "a matter of the call: it exchanges weights while the pipeline decodes",
    "kernels": "before offload, compile, trace and graphs, which wrap or record the forwards that it replaces",
    "offload": "after all that touches weights: its hooks move what is then final",
    "scheduler": "a concern of its own: the scheduler holds no weights and is in no graph",
    "compile": "last: what is compiled is the module with every other switch on it",
    "trace": "last: a trace freezes what it sees",
    "exported": "last: its code was made of the module as it then is",
    "graphs": "over all that is recorded: a graph holds what the other switches make the modules do",
    "denoiser_slicing": "over graphs and compiled code: each slice is a call of theirs",
    "time": "over graphs: what it makes of the timesteps is their input",
    "prompt": "over graphs: what it makes of the prompt is their input",
    "guidance": "over graphs: it says in which mode they are called",
    "memory_fallback": "around all of it, and during the pipeline's calls only",
}
"""Slot -> why it stands where it stands. The order of the keys is the order in which switches are applied."""

_POSITIONS = {slot: position for position, slot in enumerate(SLOT_ORDER)}
# one switch of these slots at a time: they put themselves in the same place
_EXCLUSIVE_SLOTS = {
    "attention": "a layer has one attention processor at a time",
    "offload": "a component has one mover of its weights at a time",
}

# these modes of Inductor record CUDA graphs themselves
_MODES_WITH_GRAPHS = ("reduce-overhead", "max-autotune")
_COMPILES = (CompileUNet, CompileTransformer, CompileVAE)
_STREAMING = (PartialOffload, GroupOffload, SequentialOffload)


def _hooks_layers(first: Options, second: Options) -> bool:
    """Whether an offload has hooks on the denoiser's layers, or brings it only when it is called."""
    return not (isinstance(second, PartialOffload) and second.keeps_all)


def _moves_unrecorded(first: Options, second: Options) -> bool:
    """Whether an offload moves weights of the denoiser in its call, in a way that no graph can hold."""
    return not (isinstance(second, PartialOffload) and (second.keeps_all or second.pin_memory))


@dataclass(frozen=True, kw_only=True)
class Conflict:
    """Two kinds of switches that can't be on together, when `applies` says so of the two (first, second)."""

    first: tuple[type[Options], ...]
    second: tuple[type[Options], ...]
    reason: str
    applies: Callable[[Options, Options], bool] = lambda first, second: True


CONFLICTS: tuple[Conflict, ...] = (
    Conflict(
        first=_COMPILES,
        second=(SequentialOffload,),
        # diffusers 0.42: TypeError from the hooked forward when blocks are compiled
        reason="sequential offload replaces every layer's forward, and a graph can't move weights in its middle",
    ),
    Conflict(
        first=_COMPILES,
        second=(PartialOffload, GroupOffload),
        # diffusers 0.42 keeps the group hooks out of graphs by torch.compiler.disable, and so are ours
        reason="offload by groups breaks the graph at every group, so the compiler has only fragments to work on",
    ),
    Conflict(
        first=_COMPILES,
        second=(ModelOffload,),
        reason="model offload's hook is a graph break, which fullgraph=True refuses; leave fullgraph off",
        applies=lambda first, second: bool(getattr(first, "fullgraph", False)),
    ),
    Conflict(
        first=(CompileUNet,),
        second=(TraceUNet,),
        reason="compile and trace both replace the UNet's forward",
    ),
    Conflict(
        first=(TraceUNet,),
        second=_STREAMING,
        reason="a trace holds the weights it was made with, so nothing is left to be streamed",
    ),
    Conflict(
        first=(LoadExportedUNet,),
        second=(CompileUNet, TraceUNet),
        reason="both stand in for the UNet's own call",
    ),
    Conflict(
        first=(LoadExportedUNet,),
        second=(ModelOffload, *_STREAMING),
        reason="offload moves weights in the middle of a call, and exported code reads them where they were",
    ),
    Conflict(
        first=(CompileVAE,),
        second=(VAETiling, VAEExactTiling),
        reason="group norms of tiles take each picture's own statistics, so tiles run outside compiled code",
    ),
    Conflict(
        first=(CUDAGraphs,),
        second=(ModelOffload, *_STREAMING),
        reason="offload moves weights in the middle of a call, and a graph holds their addresses",
        applies=_moves_unrecorded,
    ),
    Conflict(
        first=(CUDAGraphs,),
        second=_COMPILES,
        reason="this mode of the compiler records graphs itself; compile without a mode",
        applies=lambda first, second: getattr(second, "mode", None) in _MODES_WITH_GRAPHS,
    ),
    Conflict(
        first=(CUDAGraphs,),
        second=(TraceUNet,),
        reason="TorchScript chooses its kernels in its first calls, which a recording must not see",
    ),
    Conflict(
        first=(TimeProjections, PromptProjections, SharedGuidance),
        second=(ModelOffload, *_STREAMING),
        reason="offload brings the weights when the UNet is called, and hooks take the forwards that this replaces",
        applies=_hooks_layers,
    ),
    Conflict(
        first=(TimeProjections, PromptProjections, SharedGuidance),
        second=(TraceUNet, LoadExportedUNet),
        reason="a trace or an export has the UNet's forward frozen as it was",
    ),
    Conflict(
        first=(SharedGuidance,),
        second=(DenoiserSlicing,),
        reason="slices part the two halves of guidance, so that nothing is left to be shared",
    ),
    Conflict(
        first=(VAEUpcastCopy,),
        second=(ModelOffload, *_STREAMING),
        reason="offload moves the weights that a copy is kept of",
    ),
    Conflict(
        first=(FusedQKV,),
        second=(ModelOffload, *_STREAMING),
        reason="offload moves weights one by one, and fused projections are one with the weights that they are made of",
    ),
)


def conflicts_between(one: Options, other: Options) -> list[str]:
    """Return why the two can't be on together; an empty list means they can. The order of the two does not matter.

    >>> from diffusers_turbo.planning.options import SDPAAttention, NaiveAttention, ChannelsLast
    >>> conflicts_between(SDPAAttention(), NaiveAttention())
    ['a layer has one attention processor at a time']
    >>> conflicts_between(SDPAAttention(), ChannelsLast())
    []
    """
    reasons = []
    if one.action != other.action and one.slot == other.slot and one.slot in _EXCLUSIVE_SLOTS:
        reasons.append(_EXCLUSIVE_SLOTS[one.slot])
    for conflict in CONFLICTS:
        for first, second in ((one, other), (other, one)):
            if isinstance(first, conflict.first) and isinstance(second, conflict.second):
                if conflict.applies(first, second):
                    reasons.append(conflict.reason)
                break
    return reasons


def conflicts_with(option: Options, others: Iterable[Options]) -> list[str]:
    """Return why the option can't join the others, each reason naming the other's method; empty means it can."""
    return [f"{other.action}: {reason}" for other in others for reason in conflicts_between(option, other)]


def in_order(options: Iterable[Options]) -> list[Options]:
    """Return the switches in the order in which they are applied; within a slot they keep theirs.

    >>> from diffusers_turbo.planning.options import CompileUNet, HalfPrecision
    >>> [option.slot for option in in_order([CompileUNet(), HalfPrecision()])]
    ['precision', 'compile']
    """
    return sorted(options, key=lambda option: _POSITIONS[option.slot])
