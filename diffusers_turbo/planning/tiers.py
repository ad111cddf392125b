"""Tiers: which set of switches for speed was asked for, and which of the two it comes to here.

*instant* launches whole networks as CUDA graphs and has its first picture in seconds; *compiled* puts torch.compile
under the graphs, which takes minutes and pays after thousands of pictures, if ever. Where they were measured a plan
takes the faster of the two by itself; elsewhere it takes a tier when asked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from . import gains
from .conflicts import conflicts_with
from .options import (
    DOUBLING_PIPELINES,
    SYNC_FREE_SCHEDULERS,
    CUDAGraphs,
    FusedKernels,
    Options,
    PointwiseMatmul,
    PromptProjections,
    SharedGuidance,
    SyncFreeLoop,
    TimeProjections,
    VAEUpcastCopy,
)
from .request import Situation, Verdict, leave, take
from .speed import LOWEST_SM, PLAIN_PROCESSORS, compile_trouble, judge_precision, running_dtype, sm_text

_WAITS = {
    "DDIMScheduler": "at each step, for the timestep",
    "PNDMScheduler": "at each step, for the timestep",
    "LCMScheduler": "at each step, for the timestep",
    "UniPCMultistepScheduler": "many times at each step, for what it solves",
    "EulerAncestralDiscreteScheduler": "at each step when its noise comes from a CPU generator",
}
"""When diffusers' own loop waits for the GPU. Source: `tests/schedulers/test_never_waits.py`, where each is caught."""

_WAITS_ONCE = "once a picture, unless the pipeline says where the loop begins"


@dataclass(frozen=True, kw_only=True)
class Tier:
    """What is switched on beyond what was measured: "instant", "compiled" or nothing (None), and why."""

    name: str | None
    reason: str


_HALF = ("float16", "bfloat16")


def settle_tier(situation: Situation, others: Sequence[Options], *, lean: bool) -> Tier:
    """Say which tier a plan with these other switches is of; a lean one keeps nothing for the sake of speed."""
    asked, device = situation.request.tier, situation.device
    if asked == "none":
        return Tier(name=None, reason='tier="none"')
    if device.device_type != "cuda" or device.sm is None:
        return Tier(name=None, reason=f"tiers are for NVIDIA GPUs, this is {device.name}")
    if asked is None and (unmeasured := _why_not_by_default(situation)):
        return Tier(name=None, reason=f'{unmeasured}: ask for it with tier="instant" or "compiled"')
    if moves := conflicts_with(CUDAGraphs(), others):
        return Tier(name=None, reason=f"not beside {moves[0]}")
    if lean:
        return Tier(name=None, reason="memory is tight, and a graph keeps what it was recorded in")
    if asked == "instant":
        return Tier(name="instant", reason='tier="instant"')
    faster = _fastest(situation)
    if "compiled" in (asked, faster.name):
        if trouble := compile_trouble(situation, situation.pipeline.denoiser, others):
            return Tier(name="instant", reason=f"not compiled: {trouble[0].lower()}{trouble[1:].rstrip('.')}")
        return faster if faster.name == "compiled" else Tier(name="compiled", reason='tier="compiled"')
    return faster


def _why_not_by_default(situation: Situation) -> str | None:
    """Say why a plan takes no tier that it was not asked for, None where it does."""
    family = situation.pipeline.family
    if family not in gains.TIER_GAINS:
        return f"it has not been measured for this model ({family})"
    return None if _gain(situation) is not None else f"it has not been measured for {family} in {_dtype(situation)}"


def _dtype(situation: Situation) -> str:
    return running_dtype(situation, judge_precision(situation))


def _gain(situation: Situation) -> gains.TierGain | None:
    return gains.tier_gain(situation.pipeline.family, _dtype(situation))


def _fastest(situation: Situation) -> Tier:
    """Choose by the number of pictures, from measured figures."""
    gain, images = _gain(situation), situation.request.images
    if gain is None:
        return Tier(name="instant", reason="nothing was measured to say when compiling pays here")
    measured = f"{gain.plain_ms} to {gain.instant_ms} ms a picture ({gain.setting}; {gain.source})"
    if gain.compiled_ms is not None and gain.compiled_ms >= gain.instant_ms:
        never = f"compiling pays for no number of pictures ({gain.compiled_ms} ms; {gain.compiled_source})"
        return Tier(name="instant", reason=f"{measured}; {never}")
    if (pays := gain.break_even_images) is None:
        return Tier(name="instant", reason=f"{measured}; nothing was measured to say when compiling pays")
    then = f"compiling pays from {pays} pictures on ({gain.compiled_ms} ms; {gain.compiled_source})"
    if images is None or images < pays:
        many = "how many are wanted was not said" if images is None else f"{images} are wanted"
        return Tier(name="instant", reason=f"{measured}; {then}, {many}")
    return Tier(name="compiled", reason=f"{measured}; {then}, {images} are wanted")


def judge_tier(situation: Situation, tier: Tier, others: Sequence[Options], *, compiled: bool) -> list[Verdict]:
    """Decide on every switch that only a tier throws, beside others.

    `compiled` says whether the plan compiles the denoiser.
    """
    verdicts = []
    for options, trouble_with, gain in _SWITCHES:
        what = gain.format(waits=_WAITS.get(situation.pipeline.scheduler or "", _WAITS_ONCE))
        if trouble := trouble_with(situation):
            verdicts.append(leave(options, trouble))
        elif compiled and isinstance(options, FusedKernels):
            verdicts.append(leave(options, "The compiler fuses the same passes itself."))
        elif compiled and isinstance(options, PointwiseMatmul):
            verdicts.append(leave(options, "The compiler adds biases in other passes itself."))
        elif tier.name is None:
            verdicts.append(leave(options, f"{what}; {tier.reason}."))
        elif clashes := conflicts_with(options, others):
            verdicts.append(leave(options, f"{what}; not beside {clashes[0]}."))
        else:
            verdicts.append(take(options, f"{what} ({tier.name} tier)."))
    return verdicts


def _graphs(situation: Situation) -> str | None:
    facts, device = situation.pipeline, situation.device
    if device.device_type != "cuda":
        return f"Graphs are recorded on CUDA devices only; this is {device.name}."
    if facts.refusals:
        return f"{'; '.join(facts.refusals)}, which was not tried under graphs."
    return f"{facts.hooks[0]} moves weights, and a graph holds their addresses." if facts.hooks else None


def _loop(situation: Situation) -> str | None:
    name, device = situation.pipeline.scheduler, situation.device
    if device.device_type == "cpu":
        return f"On {device.name} host and device are one: there is nothing to wait for."
    if name is None:
        return f"{situation.pipeline.class_name} has no scheduler."
    if name not in SYNC_FREE_SCHEDULERS:
        return f"{name} is not among the schedulers it knows: {', '.join(SYNC_FREE_SCHEDULERS)}."
    return None if device.device_type == "cuda" else f"It was made for CUDA and not tried on {device.name}."


def _kernels(situation: Situation) -> str | None:
    device, facts = situation.device, situation.pipeline
    if device.device_type != "cuda":
        return f"They run on NVIDIA GPUs only; this is {device.name}."
    if device.sm is None:
        return f"They were written for NVIDIA GPUs; this is {device.name}."
    if device.sm < LOWEST_SM:
        return f"Triton needs SM {LOWEST_SM[0]}.{LOWEST_SM[1]}, this is {sm_text(device)}."
    if not device.triton:
        return "Triton is missing, which they are written in."
    if facts.refusals:
        return f"{'; '.join(facts.refusals)}, which was not tried with them."
    if facts.shape.kind == "transformer":
        return "A transformer has few of the layers they fit, most of them in its VAE."
    if _dtype(situation) == "float32" and not device.tf32:
        return "They work channels-last, which pays in float32 on cards with TF32 only."
    return None


def _unet(situation: Situation) -> str | None:
    """What every switch asks for that lays forwards of its own on a UNet's layers."""
    facts = situation.pipeline
    if facts.shape.kind == "transformer":
        return "It was made for UNets."
    if facts.refusals:
        return f"{'; '.join(facts.refusals)}, so its layers are left as they are."
    if facts.hooks:
        return f"{facts.hooks[0]} moves weights, and holds the layers' forwards."
    if facts.shape.class_name != "UNet2DConditionModel":
        return f"A {facts.shape.class_name} was not tried with it."
    return None


def _prompt(situation: Situation) -> str | None:
    facts = situation.pipeline
    if extras := set(facts.shape.extras) & {"encoder_hid_dim", "encoder_hid_dim_type"}:
        return f"The UNet sends its prompt through a projection of its own first ({', '.join(sorted(extras))})."
    if foreign := sorted(set(facts.processors) - set(PLAIN_PROCESSORS)):
        return f"What {', '.join(foreign)} does with the prompt is not known."
    if not facts.shape.text_conditioned:
        return "The UNet takes no prompt."
    return _unet(situation)


def _time(situation: Situation) -> str | None:
    shape = situation.pipeline.shape
    known = {"addition_embed_type"} if shape.added_text_time else set()
    extras = sorted(set(shape.extras) - known - {"encoder_hid_dim", "encoder_hid_dim_type"})
    return f"The UNet embeds more than its time ({', '.join(extras)})." if extras else _unet(situation)


def _guidance(situation: Situation) -> str | None:
    facts = situation.pipeline
    if facts.class_name not in DOUBLING_PIPELINES:
        return f"Whether {facts.class_name} calls its denoiser with two equal halves is not known."
    if facts.shape.extras:
        return f"The UNet adds what may differ between the halves ({', '.join(facts.shape.extras)})."
    return _unet(situation)


def _pointwise(situation: Situation) -> str | None:
    dtype = _dtype(situation)
    if dtype not in _HALF:
        return f"In {dtype} convolutions may be set to use TF32 where products are not."
    return _unet(situation)


def _upcast_copy(situation: Situation) -> str | None:
    facts = situation.pipeline
    dtypes = {part.dtype for part in facts.components if part.name == "vae"}
    if facts.vae is None or not facts.vae.force_upcast or not dtypes <= {"float16", "bfloat16"}:
        return f"{facts.class_name} decodes in the dtype its VAE has."
    return f"{facts.hooks[0]} moves the weights that a copy is kept of." if facts.hooks else None


_SWITCHES: tuple[tuple[Options, Callable[[Situation], str | None], str], ...] = (
    (VAEUpcastCopy(), _upcast_copy, "It spares two casts of the VAE a picture"),
    (FusedKernels(), _kernels, "They spare passes over memory in norms and feed-forwards of a channels-last UNet"),
    (PointwiseMatmul(), _pointwise, "It spares a pass over memory for the bias of each 1x1 convolution"),
    (SyncFreeLoop(), _loop, "It spares the host's waiting for the GPU {waits}"),
    (CUDAGraphs(), _graphs, "It spares the launches one by one"),
    (TimeProjections(), _time, "It spares a UNet's time embedding and a product a resnet at every step"),
    (PromptProjections(), _prompt, "It spares two products a cross-attention layer at every step"),
    (SharedGuidance(), _guidance, "It halves the UNet's first resnet and first self-attention"),
)
