"""How each switch of this package enters a prediction: thrown on the skeleton, a rule of the replay, or not at all.

What changes what the networks do is thrown on the skeleton, by the action itself, and so is seen by the run. What moves
weights or keeps memory beside the run (offload, graphs, copies) is a rule of the replay.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from ..actions.apply import APPLY
from ..actions.attention import FusedAttention
from ..actions.fused_kernels import put_in
from ..actions.ledger import ledger_of
from ..actions.precision import cast
from ..actions.undo import Journal
from ..errors import NotSupportedError
from ..facts.device import DeviceFacts
from ..kernels.registry import KERNELS
from ..planning import options as opt
from ..planning.conflicts import in_order
from ..planning.options import Options
from .attention import set_processors
from .recording import Marks
from .repeating import shorten_pictures
from .skeleton import Skeleton

ON_SKELETON = (
    opt.HalfPrecision,
    opt.ChannelsLast,
    opt.PointwiseMatmul,
    opt.FusedQKV,
    opt.FusedKernels,
)
"""Thrown on the skeleton by their own actions."""

ON_VAE = (opt.VAESlicing, opt.VAETiling, opt.VAEExactTiling)
"""The same, but taken back after the VAE has run: no other component differs, and so no other skeleton is made."""

ON_DENOISER = (opt.DenoiserSlicing,)
"""The same, for the stage of the denoiser."""

ATTENTION = (opt.NaiveAttention, opt.SDPAAttention, opt.XFormersAttention, opt.SlicedAttention)
"""Set on the skeleton's layers as the actions would on the device that is asked about."""

IN_REPLAY = (
    opt.ModelOffload,
    opt.SequentialOffload,
    opt.GroupOffload,
    opt.PartialOffload,
    opt.CUDAGraphs,
    opt.PromptProjections,
    opt.VAEUpcastCopy,
)
"""Rules of the replay."""

NO_DIFFERENCE = (opt.TF32, opt.SyncFreeLoop, opt.MemoryFallback)
"""Take no memory of their own."""

AS_PLAIN: dict[type[Options], str] = {
    opt.SharedGuidance: "shared guidance is predicted as the whole batch of both halves, which holds more",
    opt.TimeProjections: "the time projections of all steps (a few MiB) are left out",
    opt.CompileUNet: "compiled code is predicted as eager code, not measured: fusing usually holds less",
    opt.CompileTransformer: "compiled code is predicted as eager code, not measured: fusing usually holds less",
    opt.CompileVAE: "compiled code is predicted as eager code, not measured: fusing usually holds less",
    opt.TraceUNet: "a traced UNet is predicted as the eager one, not measured",
    opt.LoadExportedUNet: "an exported UNet is predicted as the eager one, not measured",
}
"""Predicted as if they were off, with the sentence that says so."""

UNMEASURED = (opt.CompileUNet, opt.CompileTransformer, opt.CompileVAE, opt.TraceUNet, opt.LoadExportedUNet)
"""Those of them whose peaks may be higher than predicted."""


def in_force(pipe: object, options: Sequence[Options]) -> tuple[Options, ...]:
    """Return the options and the switches that are on already and not replaced by one of them."""
    ledger = ledger_of(pipe)
    slots = {option.slot for option in options}
    on = [lever.options for lever in ledger.in_force()] if ledger is not None else []
    known = [option for option in on if isinstance(option, Options) and not isinstance(option, FusedAttention)]
    return (*(option for option in known if option.slot not in slots), *options)


def throw(skeleton: Skeleton, options: Sequence[Options], already: Sequence[Options], device: DeviceFacts) -> list[str]:
    """Throw on the skeleton what changes its networks, but for what is `already` on; return what could not be."""
    told = []
    for option in in_order(option for option in options if isinstance(option, ON_SKELETON)):
        # their forwards were left behind
        if option in already and not isinstance(option, (opt.PointwiseMatmul, opt.FusedKernels)):
            continue
        if isinstance(option, opt.HalfPrecision):
            # the action keeps the originals, and there are none here
            cast(skeleton.pipe, getattr(torch, option.dtype or skeleton.facts.native_dtype))
            continue
        told += _throw_one(skeleton, option, device)[1]
    attention = next((option for option in options if isinstance(option, ATTENTION)), None)
    if attention is None and any(isinstance(option, opt.FusedQKV) for option in options):
        attention = FusedAttention()  # diffusers' own processors leave fused projections aside
    for root in skeleton.modules.values():
        set_processors(root, None if attention in already else attention, device)
    return told


@contextmanager
def thrown_for_stage(
    skeleton: Skeleton, options: Sequence[Options], already: Sequence[Options], marks: Marks
) -> Iterator[list[str]]:
    """Have the switches of one stage on inside the block, but for those that are `already`; give what could not be.

    Calls that stood over the networks' own were left behind.
    """
    missing = [option for option in options if option not in already or isinstance(option, ON_DENOISER)]
    thrown = [_throw_one(skeleton, option) for option in in_order(missing)]
    if (vae := skeleton.modules.get("vae")) is not None:
        shorten_pictures(vae, marks)
    try:
        yield [sentence for _, told in thrown for sentence in told]
    finally:
        for journal, _ in reversed(thrown):
            journal.revert()


def _throw_one(skeleton: Skeleton, option: Options, device: DeviceFacts | None = None) -> tuple[Journal, list[str]]:
    try:
        if isinstance(option, opt.FusedKernels):
            return _fused_kernels(skeleton, option, device), []
        return APPLY[type(option)](skeleton.pipe, option), []
    except NotSupportedError as error:
        told = f"{option.action}() cannot be thrown on this pipeline: {' '.join(str(error).split())}"
        return Journal(), [told]


def _fused_kernels(skeleton: Skeleton, option: opt.FusedKernels, device: DeviceFacts | None) -> Journal:
    """Put in the kernels that run on the device that is asked about; on the meta device they only allocate.

    Layers that are looked at here, as those are that weights are streamed into, do without a convolution's or
    projection's own kernel.
    """
    level = device.sm if device is not None else None
    wanted = [name for name, on in option.as_dict().items() if on]
    places = {name: KERNELS[name].places_at("meta", level) if level else frozenset() for name in wanted}
    return put_in(skeleton.pipe, places, f"{option.action}()")
