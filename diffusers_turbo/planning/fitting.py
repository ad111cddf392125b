"""Verdicts on the switches that are about memory: VAE slicing, attention slicing, offload, VAE tiling.

Given every rung of the ladder with its estimate, and the one that was chosen.
"""

from __future__ import annotations

from collections.abc import Sequence

from .ladder import (
    SLICE_ATTENTION,
    Estimated,
    all_offloads,
    denoiser_slices,
    exact_tiles_of,
    offload_device,
    offload_trouble,
    tile_sizes,
)
from .options import (
    DenoiserSlicing,
    MemoryFallback,
    Options,
    PartialOffload,
    SlicedAttention,
    VAEExactTiling,
    VAESlicing,
    VAETiling,
)
from .request import Situation, Verdict, leave, take
from .timing import moves_weights
from .units import gib

AMPLE = 0.8
"""Up to this share of the usable memory a plan counts as one with room to spare."""


def judge_memory(situation: Situation, tried: Sequence[Estimated], chosen: Estimated) -> list[Verdict]:
    """Return a verdict on each memory switch, given every rung's estimate and the one that was chosen."""
    usable = situation.usable_bytes
    plain = tried[0].needed_bytes
    if usable is None:
        need = "free memory is unknown here, so no memory switch is taken; name a vram_budget to have one"
        return [leave(option, f"{need[0].upper()}{need[1:]}.") for option in _all_kinds(situation)]
    verdicts = []
    for option in _all_kinds(situation):
        taken = next((item for item in chosen.rung.options if type(item) is type(option)), None)
        if taken is not None:
            verdicts.append(take(taken, _why_taken(taken, situation, tried, chosen, usable)))
        elif trouble := _trouble(option, situation):
            verdicts.append(leave(option, trouble))
        elif isinstance(option, SlicedAttention) and not any(item.rung.has(SlicedAttention) for item in tried):
            verdicts.append(leave(option, "Attention holds no score matrix here, so slicing would only slow it down."))
        elif plain <= usable:
            verdicts.append(leave(option, f"Not needed: the peak with margin is {gib(plain)} of {gib(usable)} usable."))
        else:
            verdicts.append(leave(option, _why_left(option, situation, tried, chosen, usable)))
    return verdicts


def judge_fallback(situation: Situation, chosen: Estimated) -> Verdict:
    """Decide on what happens when the estimate was wrong: taken where it is close enough to the limit to matter."""
    device, usable = situation.device, situation.usable_bytes
    # where a plan is of tiles, smaller ones are no new kind of loss
    option = MemoryFallback(allow_tiling=chosen.rung.has(VAETiling))
    if device.device_type != "cuda":
        return leave(option, f"The errors it answers are those of CUDA's allocator; this is {device.name}.")
    if usable is None:
        return leave(option, "Free memory is unknown here: call it yourself, it costs nothing until memory runs out.")
    numbers = f"{gib(chosen.needed_bytes)} with margin of {gib(usable)} usable"
    if chosen.needed_bytes <= AMPLE * usable:
        return leave(option, f"Room enough: {numbers}.")
    smaller = ", at last in smaller tiles" if option.allow_tiling else ""
    return take(
        option, f"Little room is left ({numbers}): a component that runs out of it is called again with less{smaller}."
    )


def _all_kinds(situation: Situation) -> list[Options]:
    sizes = tile_sizes(situation)
    return [
        SLICE_ATTENTION,
        (*denoiser_slices(situation), DenoiserSlicing())[0],
        VAESlicing(),
        VAEExactTiling(),
        VAETiling(tile_size=sizes[0] if sizes else None),
        *all_offloads(situation, PartialOffload(device=offload_device(situation))),
    ]


def _trouble(option: Options, situation: Situation) -> str | None:
    """Say why a switch is out of the question whatever the memory, None where it is not."""
    facts, vae = situation.pipeline, situation.pipeline.vae
    if moves_weights([option]):
        return offload_trouble(situation)
    if isinstance(option, SlicedAttention):
        if facts.shape.kind != "unet":
            return "It has no effect on a transformer's processors."
        return "It would replace IP-Adapter's processors." if facts.ip_adapter else None
    if isinstance(option, DenoiserSlicing):
        if denoiser_slices(situation):
            return None
        one = situation.samples == 1
        return "The denoiser works on a single sample." if one else f"A {facts.shape.class_name} was not tried with it."
    if vae is None:
        return f"{facts.class_name} has no VAE."
    if isinstance(option, VAESlicing):
        if vae.slicing:
            return "It is on already."
        if not vae.can_slice:
            return f"{vae.class_name} can't decode in slices."
        return "A batch of one picture has nothing to slice." if situation.request.batch_size == 1 else None
    if isinstance(option, VAEExactTiling):
        if not vae.can_tile_exactly:
            return f"This {vae.class_name} is not known to it, or its weights come and go layer by layer."
        if vae.tiling:
            return "The VAE decodes in tiles already."
        if not exact_tiles_of(situation):
            return f"A picture of {situation.width}x{situation.height} fits into one tile."
        return None
    if vae.tiling:
        return "It is on already."
    if not vae.can_tile:
        return f"{vae.class_name} can't decode in tiles."
    if not tile_sizes(situation):
        return f"A picture of {situation.width}x{situation.height} fits into one tile."
    return None


def _why_taken(
    option: Options, situation: Situation, tried: Sequence[Estimated], chosen: Estimated, usable: int
) -> str:
    before = _cheapest_without(option, tried, chosen)
    numbers = f"needs {gib(before)} without it and {gib(chosen.needed_bytes)} with this plan, {gib(usable)} are usable"
    if before <= usable and not chosen.missed_seconds:
        spared = max(item.missed_seconds for item in tried)
        graphs = f"not with CUDA graphs, which spare up to {spared:.1f} s a call"
        numbers = f"would fit without it, but {graphs}; it {numbers}"
    if isinstance(option, VAETiling):
        return f"No exact plan fits: it {numbers}. LOSSY: {VAETiling.lossy_reason}."
    if isinstance(option, DenoiserSlicing):
        how = f"The denoiser works on {option.slice_size} of {situation.samples} samples at a time"
        return f"{how}: the pipeline {numbers}. That adds {_seconds(chosen.slicing_seconds)} on an H100."
    if isinstance(option, VAESlicing):
        return f"The batch of {situation.request.batch_size} is decoded one by one: {numbers}."
    if isinstance(option, SlicedAttention):
        return f"No fused kernel keeps the score matrix out of memory here: {numbers}."
    if isinstance(option, VAEExactTiling):
        where = "wait in host memory" if option.hold_on == "host" else "stay on the device"
        how = f"The untiled picture from tiles; between the VAE's layers pictures {where}"
        return f"{how}: the pipeline {numbers}. That adds {_seconds(chosen.tiling_seconds)} on an H100."
    time = _seconds(chosen.moving_seconds)
    seconds = f"up to {time} to a call of {situation.request.steps} steps at the bus rates of an H100"
    if isinstance(option, PartialOffload):
        meanwhile = "leave while other components work" if option.denoiser_leaves else "stay between pictures too"
        if option.resident_bytes is None:
            whole = "leaves while other components work" if option.denoiser_leaves else "stays between pictures too"
            return (
                f"The pipeline {numbers}. The denoiser is there whole while it works and {whole}; text encoders and "
                f"VAE come and go, which adds {seconds}."
            )
        alone = f"; {', '.join(option.alone)} come layer by layer" if option.alone else ""
        hidden = ", less what computing hides" if option.prefetch else ", one group of layers after the other"
        return (
            f"The pipeline {numbers}. {gib(int(option.resident_bytes))} of the denoiser fill the room there is and "
            f"{meanwhile}; the rest is copied at every step, which adds {seconds}{hidden}{alone}."
        )
    return f"The pipeline {numbers}. Moving its weights adds {seconds}."


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 0.1 else f"{1000 * seconds:.0f} ms"


def _cheapest_without(option: Options, tried: Sequence[Estimated], chosen: Estimated) -> int:
    """Return what the plan would need at most just below the rung that brings this switch in."""
    position = tried.index(chosen)
    earlier = [item.needed_bytes for item in tried[:position] if not item.rung.has(type(option))]
    return min(earlier, default=tried[0].needed_bytes)


def _why_left(option: Options, situation: Situation, tried: Sequence[Estimated], chosen: Estimated, usable: int) -> str:
    position = tried.index(chosen)
    with_it = [item for item in tried if item.rung.has(type(option))]
    if not with_it and not option.exact:
        return f"exact=True forbids it: {option.lossy_reason}."
    before = [item for item in tried[:position] if item in with_it]
    if before:
        least = min(before, key=lambda item: item.needed_bytes)
        if least.needed_bytes <= usable:
            call = f"{least.added_seconds:.1f} s to a call of {situation.request.steps} steps"
            more = f"{call} where the plan adds {chosen.added_seconds:.1f}"
            return f"It would fit with {gib(least.needed_bytes)} of {gib(usable)} usable, but adds up to {more}."
        return f"It is not enough: {gib(least.needed_bytes)} with margin of {gib(usable)} usable."
    fits = "fits" if chosen.needed_bytes <= usable else "is the thriftiest there is"
    return f"Not needed: {chosen.rung.name} {fits} with {gib(chosen.needed_bytes)} of {gib(usable)} usable."
