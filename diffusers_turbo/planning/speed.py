"""Verdicts on the switches that are about speed: precision, layout, projections, attention, TF32, compile, trace.

Each function answers for one slot and is pure; what other slots decided comes in as arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from . import gains
from .conflicts import conflicts_with
from .memory import holds_scores
from .options import (
    TF32,
    ChannelsLast,
    CompileTransformer,
    CompileUNet,
    CompileVAE,
    FusedQKV,
    HalfPrecision,
    LoadExportedUNet,
    NaiveAttention,
    Options,
    SDPAAttention,
    TraceUNet,
    XFormersAttention,
)
from .request import Situation, Verdict, leave, take
from .units import gib

if TYPE_CHECKING:
    from ..facts.device import DeviceFacts
    from .tiers import Tier

_FORMAT = {"float16": "fp16", "bfloat16": "bf16"}
PLAIN_PROCESSORS = (
    *("AttnProcessor", "AttnProcessor2_0", "AttnAddedKVProcessor", "AttnAddedKVProcessor2_0", "SlicedAttnProcessor"),
    *("XFormersAttnProcessor", "FusedAttnProcessor2_0", "NaiveAttnProcessor", "SDPAAttnProcessor"),
    *("SlicedAttnAddedKVProcessor", "XFormersAttnAddedKVProcessor"),
)
"""diffusers' and this package's processors that change nothing but how the same attention is computed."""

LOWEST_SM = (7, 0)
"""Where Triton starts (https://triton-lang.org/main/getting-started/installation.html)."""

_SDPA_PROCESSORS = ("AttnProcessor2_0", "AttnAddedKVProcessor2_0", "FusedAttnProcessor2_0", "SDPAAttnProcessor")
_MIN_ACCELERATE = (1, 13)


def sm_text(device: DeviceFacts) -> str:
    """Name a device with its level: "Tesla T4 (SM 7.5)"."""
    return f"{device.name} (SM {device.sm[0]}.{device.sm[1]})" if device.sm else device.name


def judge_precision(situation: Situation) -> Verdict:
    """Decide on half precision: by the request, the card and what the model was made for."""
    facts, request = situation.pipeline, situation.request
    current = facts.denoiser_facts.dtype
    wanted = request.dtype if request.dtype in _FORMAT else facts.native_dtype
    option = HalfPrecision(dtype=wanted)
    if facts.refusals:
        return leave(option, f"{'; '.join(facts.refusals)}, so its weights can't be cast.")
    if request.dtype == "float32":
        if current == "float32":
            return leave(option, 'dtype="float32" asks for what the weights already are.')
        return leave(option, f"The weights were rounded to {current} already; casting them up would restore nothing.")
    if current != "float32":
        if request.dtype in _FORMAT and request.dtype != current:
            return leave(
                option, f"The weights are {current} already; from one 16-bit format to another only loses bits."
            )
        return leave(option, f"The weights are {current} already.")
    trouble = _half_trouble(situation, wanted)
    weights = facts.parameter_bytes
    gain = (
        f"{wanted} would take the weights from {gib(weights)} to {gib(weights // 2)} "
        f"(and SD1.5 from {gains.FP32_NAIVE_MS} to {gains.FP16_NAIVE_MS} ms a picture on an H100)"
    )
    if request.dtype == "keep":
        if trouble:
            return leave(option, f"{trouble}.")
        return leave(option, f'dtype="keep": {gain}, but rounds every value; ask with dtype="auto".')
    if trouble:
        return leave(option, f"{trouble}.")
    if request.exact:
        return leave(option, f"exact=True forbids a change of dtype; {gain}.")
    made_for = f", the format this {facts.shape.kind} was made for" if wanted == facts.native_dtype else ""
    return take(option, f"{wanted}{made_for}, halves the weights from {gib(weights)} to {gib(weights // 2)}.")


def _half_trouble(situation: Situation, wanted: str) -> str | None:
    """Say why the 16-bit format is not safe here, None where it is. An explicit wish only needs the card's consent."""
    device = situation.device
    if refusal := device.refusals.get(_FORMAT[wanted]):
        return refusal
    if situation.request.dtype in _FORMAT:
        return None
    if device.device_type == "cpu":
        return "A CPU keeps float32: half precision is emulated or slower on most of them"
    if device.sm is None:
        return f"{device.name} keeps float32: half precision was not measured on it, ask for a dtype by name"
    lowest = (7, 0) if wanted == "float16" else (8, 0)
    if device.sm < lowest:
        return f"{wanted} pays from SM {lowest[0]}.{lowest[1]} on, this is {sm_text(device)}"
    return None


def running_dtype(situation: Situation, precision: Verdict) -> str:
    """Return the dtype the denoiser computes in once the precision verdict is applied."""
    if precision.taken and isinstance(precision.options, HalfPrecision) and precision.options.dtype:
        return precision.options.dtype
    return situation.pipeline.denoiser_facts.dtype


def judge_attention(situation: Situation, dtype: str) -> list[Verdict]:
    """Decide on naive, SDPA and xFormers attention; slicing is about memory and judged there."""
    facts, device = situation.pipeline, situation.device
    naive = leave(
        NaiveAttention(),
        f"It is the reference and holds the whole score matrix: {gains.NAIVE_STEP_MS} ms an SD1.5 step on an H100, "
        f"SDPA {gains.SDPA_STEP_MS}.",
    )
    fused = device.fused_sdpa(dtype)
    how = "predicted from the SM level" if device.kernels_predicted else "each ran here"
    foreign = sorted(set(facts.processors) - set(PLAIN_PROCESSORS))
    if foreign and not set(facts.processors) & set(PLAIN_PROCESSORS):
        reason = f"The processors in force ({', '.join(foreign)}) are the model's own and stay."
        return [naive, leave(SDPAAttention(), reason), leave(XFormersAttention(), reason)]
    # importing and trying xFormers takes seconds, which a device with a fused kernel of torch's own need not spend
    xformers = () if fused else tuple(name for name, dtypes in device.xformers_kernels.items() if dtype in dtypes)
    if xformers:
        return [
            naive,
            leave(SDPAAttention(), f"SDPA has no fused kernel for {dtype} on {sm_text(device)}, xFormers has."),
            take(XFormersAttention(), f"Its {xformers[0]} ran here with {dtype}, where SDPA has no fused kernel."),
        ]
    if fused:
        no_xformers = f"SDPA has a fused kernel for {dtype} ({', '.join(fused)}); xFormers' are the same algorithms."
    else:
        where = "a catalog card, nothing was run" if device.assumed else "installed or not, none ran here"
        no_xformers = f"No xFormers kernel is known to run with {dtype} on {sm_text(device)} ({where})."
    if facts.processors and all(name in _SDPA_PROCESSORS for name in (set(facts.processors) - set(foreign))):
        layers = sum(count for name, count in facts.processors.items() if name in _SDPA_PROCESSORS)
        kernels = f"{', '.join(fused)} ({how})" if fused else "none fused, only math"
        sdpa = leave(SDPAAttention(), f"Already in force on {layers} layers; kernels for {dtype}: {kernels}.")
    elif fused:
        sdpa = take(
            SDPAAttention(),
            f"A fused kernel for {dtype} ({', '.join(fused)}; {how}) never holds the score matrix.",
        )
    elif holds_scores(facts.processors):
        sdpa = take(SDPAAttention(), f"No fused kernel for {dtype} here, but SDPA's own is one call instead of three.")
    else:
        sdpa = leave(SDPAAttention(), f"SDPA has no fused kernel for {dtype} on {sm_text(device)}.")
    return [naive, sdpa, leave(XFormersAttention(), no_xformers)]


def judge_tf32(situation: Situation, dtype: str) -> Verdict:
    """TF32 is never taken: it is lossy and has to be asked for by its own method."""
    if refusal := situation.device.refusals.get("tf32"):
        return leave(TF32(), f"{refusal}.")
    if dtype != "float32":
        return leave(TF32(), f"It concerns float32 products only; the denoiser runs in {dtype}.")
    return leave(TF32(), f"{TF32.lossy_reason}: call enable_tf32() yourself if you accept that.")


def judge_compile(situation: Situation, others: Sequence[Options], tier: Tier) -> list[Verdict]:
    """Decide on compiling denoiser and VAE: where it is possible, and when the pictures or a tier ask for it."""
    facts = situation.pipeline
    folder = situation.request.cache_dir
    kinds = {"unet": CompileUNet(cache_dir=folder), "transformer": CompileTransformer(cache_dir=folder)}
    verdicts = []
    for name, option in kinds.items():
        if name != facts.denoiser:
            verdicts.append(leave(option, f"{facts.class_name} has no {name}."))
        else:
            verdicts.append(_judge_one_compile(situation, option, others, tier))
    vae = CompileVAE(cache_dir=folder)
    if facts.vae is None:
        verdicts.append(leave(vae, f"{facts.class_name} has no VAE."))
    else:
        verdicts.append(_judge_one_compile(situation, vae, others, tier))
    return verdicts


def _judge_one_compile(situation: Situation, option: Options, others: Sequence[Options], tier: Tier) -> Verdict:
    facts, images = situation.pipeline, situation.request.images
    name = "vae" if isinstance(option, CompileVAE) else facts.denoiser
    part = facts.component(name)
    if trouble := compile_trouble(situation, name, others):
        return leave(option, trouble)
    if clashes := conflicts_with(option, others):
        return leave(option, f"Not beside {clashes[0]}.")
    if tier.name == "compiled":
        return take(option, "It goes under the graphs (compiled tier).")
    if tier.name == "instant":
        return leave(option, "The instant tier does without a compiler.")
    gain = gains.COMPILE_GAINS.get(facts.family)
    if gain is None:
        size = f"{part.parameter_count / 1e6:.0f} M parameters" if part else "this size"
        return leave(
            option, f"Nothing was measured for a {facts.shape.class_name} of {size}; compile_{name}() is there."
        )
    numbers = (
        f"{gain.plain_ms:.0f} to {gain.compiled_ms:.0f} ms a picture for {gain.first_image_s:.0f} s of compiling "
        f"({gain.setting}; {gain.source})"
    )
    if images is None:
        return leave(
            option,
            f"It would gain {numbers}, and pays from {gain.break_even_images} pictures on: say images=N to have it.",
        )
    if images <= gain.break_even_images:
        return leave(
            option, f"It pays from {gain.break_even_images} pictures on, and {images} are asked for: {numbers}."
        )
    return take(option, f"{images} pictures are more than the {gain.break_even_images} that pay for it: {numbers}.")


def compile_trouble(situation: Situation, name: str, others: Sequence[Options]) -> str | None:
    """Say why a component can't be compiled here, None where it can."""
    facts, device = situation.pipeline, situation.device
    if device.device_type != "cuda":
        return f"Compiling was not measured on {device.name}."
    if device.sm is None or device.sm < LOWEST_SM:
        return f"torch.compile's Triton needs SM {LOWEST_SM[0]}.{LOWEST_SM[1]}, this is {sm_text(device)}."
    if not device.triton:
        return "Triton is missing, which torch.compile makes its kernels with."
    if not device.cxx_compiler:
        return "There is no C++ compiler, which torch.compile needs for its wrappers."
    if name in facts.compiled:
        return f"The {name} is compiled already."
    part = facts.component(name)
    if part is not None and part.refusal:
        return f"{part.refusal}, and compiling that was not tried."
    offloaded = facts.hooks or any(option.slot == "offload" for option in others)
    if offloaded and _version(device.versions.get("accelerate")) < _MIN_ACCELERATE:
        return "Offload hooks of accelerate before 1.13 can't be compiled around."
    return None


def _version(text: str | None) -> tuple[int, ...]:
    if text is None:
        return _MIN_ACCELERATE  # a catalog card: what would be installed is up to date
    return tuple(int(part) for part in text.split(".")[:2] if part.isdigit())


def judge_layout(situation: Situation, dtype: str, compiled: bool, tier: Tier, *, lean: bool) -> Verdict:
    """Decide on channels-last: from what was measured for this family, eager or compiled, or for the sake of memory."""
    facts, device = situation.pipeline, situation.device
    option = ChannelsLast()
    if facts.shape.kind == "transformer":
        return leave(option, "A transformer's work is matrix products; the layout concerns convolutions.")
    if facts.refusals:
        return leave(option, f"{'; '.join(facts.refusals)}, so its weights can't be laid out anew.")
    if device.device_type == "cpu":
        plain, last = gains.CPU_LAYOUT_SECONDS
        return leave(option, f"No gain on a CPU: {plain} s a step (SD1.5, 512x512), {last} s channels-last.")
    if not device.tensor_cores:
        return leave(option, f"It pays on tensor cores, which {device.name} has not.")
    if tier.name == "instant" and (dtype != "float32" or device.tf32):
        return take(option, "The fused kernels work in this layout (instant tier).")
    if dtype == "float32":
        return leave(option, "It pays on tensor cores beside fused kernels; the denoiser runs in float32.")
    if lean:
        return take(option, "Memory is tight, and convolutions need less workspace in this layout.")
    gain = gains.LAYOUT_GAINS.get(facts.family)
    if gain is None:
        return leave(option, f"Not measured for a UNet of this shape ({facts.family}).")
    after = gain.compiled_ms if compiled else gain.eager_ms
    how = "compiled" if compiled else "eager"
    numbers = f"{gain.plain_ms} to {after} ms, {how} ({gain.setting}; {gain.source})"
    if after >= gain.plain_ms:
        return leave(option, f"It costs more layout copies than it gains: {numbers}.")
    return take(option, f"Convolutions run without layout copies: {numbers}.")


def judge_projections(situation: Situation, others: Sequence[Options]) -> Verdict:
    """Decide on fused QKV: a small gain where it was measured, and nothing hangs on the separate projections."""
    facts, device = situation.pipeline, situation.device
    option = FusedQKV(vae=facts.vae is not None)
    if facts.shape.kind == "transformer":
        return leave(option, "Not measured for a transformer.")
    if facts.refusals:
        return leave(option, f"{'; '.join(facts.refusals)}, so its projections can't be joined.")
    if device.device_type != "cuda":
        return leave(option, f"Not measured on {device.name}.")
    if not any(layer.component == facts.denoiser for layer in facts.attention):
        return leave(option, "The denoiser has no attention layers.")
    if facts.adapters:
        return leave(option, f"The adapters {', '.join(facts.adapters)} hang on the separate projections.")
    if facts.ip_adapter:
        return leave(option, "IP-Adapter's processors use the separate projections.")
    if clashes := conflicts_with(option, others):
        return leave(option, f"Not beside {clashes[0]}.")
    if (gain := gains.FUSED_GAINS.get(facts.family)) is None:
        return leave(option, f"No gain was measured for this model ({facts.family}).")
    measured = f"{gain.separate_ms} to {gain.fused_ms} ms a picture ({gain.setting}; {gain.source})"
    return take(option, f"One product instead of three a layer: {measured}.")


def judge_trace(situation: Situation) -> Verdict:
    """Decide on a trace: for a small UNet on a CPU, where Python between the kernels is a visible share of the time."""
    facts, device, option = situation.pipeline, situation.device, TraceUNet()
    if facts.denoiser != "unet":
        return leave(option, f"{facts.class_name} has no unet.")
    if device.device_type != "cpu":
        return leave(option, f"No gain over eager was measured on {device.name}.")
    if facts.controlnet or facts.ip_adapter:
        return leave(option, "ControlNet and IP-Adapter hand the UNet inputs that a trace has not.")
    if facts.refusals or facts.hooks or facts.compiled:
        return leave(option, "A trace needs a plain UNet: not quantised, offloaded or compiled.")
    if not facts.shape.text_conditioned:
        return leave(option, "Only UNets conditioned on text are traced.")
    size = facts.denoiser_facts.parameter_count
    if size > 1.05 * gains.CPU_TRACE_PARAMETERS:
        limit = f"{gains.CPU_TRACE_PARAMETERS / 1e6:.0f} M parameters, the size measured"
        return leave(option, f"No gain is known above {limit}; this UNet has {size / 1e6:.0f} M.")
    plain, traced = gains.CPU_TRACE_SECONDS
    return take(
        option,
        f"Python between the kernels is a visible share for a UNet of {size / 1e6:.0f} M parameters on a CPU: "
        f"{plain} to {traced} s a picture (emoji model, 20 steps).",
    )


def judge_exported(situation: Situation) -> Verdict:
    """Decide on a UNet compiled ahead of time: no plan knows of a file to load."""
    option, facts = LoadExportedUNet(), situation.pipeline
    if facts.denoiser != "unet":
        return leave(option, f"{facts.class_name} has no unet.")
    return leave(
        option,
        "It needs a file that export_unet(path) makes once: load_exported_unet(path) then starts without compiling.",
    )
