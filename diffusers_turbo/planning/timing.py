"""What memory switches add to a call's time: the bytes they move between host and device, at rates that were measured.

None of what is moved is counted as hidden behind computing, so that the figure is the most it adds; what a plan does
without for the sake of memory (the instant tier) is added where it was measured. The figures are those of one host, bus
and GPU; elsewhere the order of the switches holds rather than the seconds.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil
from statistics import linear_regression

from ..facts.pipeline import PipelineFacts
from . import gains
from .memory import samples_at_once, works_in_float32
from .options import GroupOffload, ModelOffload, Options, PartialOffload, SequentialOffload, VAEExactTiling

STEPS = 30
"""Denoising steps of the call that is meant, where nobody says how many."""


def added_seconds(
    facts: PipelineFacts,
    options: Iterable[Options],
    steps: int = STEPS,
    *,
    pixels: int | None = None,
    batch_size: int = 1,
) -> float:
    """Return the seconds that memory switches add at most to one call that decodes so many pixels.

    By default those of one picture of the model's own size. Weights that are streamed come for each slice of the batch.

    >>> round(OFFLOAD_RATES["enable_model_cpu_offload"] / 1e9, 1)
    4.9
    """
    whole, denoiser = facts.parameter_bytes, facts.denoiser_facts.parameter_bytes
    options = tuple(options)
    calls = steps * denoiser_calls(facts, options, batch_size)
    moving = sum(
        moved / OFFLOAD_RATES[by]
        for option in options
        for by, moved in _moved_bytes(option, whole, denoiser, calls).items()
    )
    pixels = facts.default_height * facts.default_width if pixels is None else pixels
    return moving + tiling_seconds(facts, options, pixels) + slicing_seconds(facts, options, steps, batch_size)


def denoiser_calls(facts: PipelineFacts, options: Iterable[Options], batch_size: int) -> int:
    """Return how many calls of the denoiser a step of so many pictures is: one, or one for each slice."""
    return ceil(samples_at_once(facts, batch_size) / samples_at_once(facts, batch_size, options))


def slicing_seconds(facts: PipelineFacts, options: Iterable[Options], steps: int, batch_size: int) -> float:
    """Return the seconds that the calls of slices add at most beside that of the whole batch, under graphs.

    Each has what a call takes whatever its batch: of SD1.5 a share that was measured, which is less of larger models.
    """
    more = float(denoiser_calls(facts, options, batch_size) - 1)
    gain = gains.tier_gain(facts.family, facts.denoiser_facts.dtype)
    if gain is None:
        gain = gains.TIER_GAINS["sd15"]
        more *= facts.denoiser_facts.parameter_bytes / gains.OFFLOAD_DENOISER_BYTES
    return more * steps * SHARE_OF_ANY_CALL * gain.instant_ms / 1000 / gain.steps


def tiling_seconds(facts: PipelineFacts, options: Iterable[Options], pixels: int) -> float:
    """Return the seconds that exact tiles add to the decode of so many pixels."""
    option = next((option for option in options if isinstance(option, VAEExactTiling)), None)
    if option is None or facts.vae is None:
        return 0.0
    measured = gains.EXACT_TILES_SECONDS["float32" if works_in_float32(facts) else "float16"]
    small, large = sorted({tile for tile, _ in measured})
    seconds = measured[large, option.hold_on] if option.tile_size >= large else measured[small, "host"]
    return seconds * pixels / gains.DECODE_PIXELS


def missed_seconds(facts: PipelineFacts, steps: int = STEPS) -> float:
    """Return the seconds a call takes longer without the instant tier, 0 where that was not measured."""
    gain = gains.tier_gain(facts.family, facts.denoiser_facts.dtype)
    return 0.0 if gain is None else (gain.plain_ms - gain.instant_ms) / 1000 * steps / gain.steps


def moves_weights(options: Iterable[Options]) -> bool:
    """Whether any of these switches moves weights during a call."""
    return any(option.slot == ModelOffload.slot for option in options)


def _moved_bytes(option: Options, whole: int, denoiser: int, calls: int) -> dict[str, int]:
    """Return what goes over the bus in so many calls of the denoiser, by the rate it goes at."""
    if isinstance(option, ModelOffload):
        return {ModelOffload.action: 2 * whole}  # each component comes once, and goes back
    if isinstance(option, PartialOffload):
        stays = option.stays(denoiser)
        comes = whole - denoiser + (stays if option.denoiser_leaves else 0)
        # what comes has its place in host memory still when it goes
        return {PartialOffload.action if option.pin_memory else "ordinary": comes + calls * (denoiser - stays)}
    if isinstance(option, (GroupOffload, SequentialOffload)):
        # each layer comes at every call; host memory still holds it when it goes
        return {option.action: (whole - denoiser) + calls * denoiser}
    return {}


def _rates() -> dict[str, float]:
    measured = gains.OFFLOAD_SECONDS
    options: tuple[Options, ...] = (ModelOffload(), GroupOffload(), SequentialOffload())
    rates = {
        option.action: sum(
            _moved_bytes(option, gains.OFFLOAD_BYTES, gains.OFFLOAD_DENOISER_BYTES, gains.OFFLOAD_STEPS).values()
        )
        / (measured[option.action] - measured["none"])
        for option in options
    }
    return rates | {PartialOffload.action: gains.COPY_RATES["page-locked"], "ordinary": gains.COPY_RATES["ordinary"]}


OFFLOAD_RATES = _rates()
"""Bytes a second by switch, from `gains.OFFLOAD_SECONDS`; of our own copies from `gains.COPY_RATES`."""


SHARE_OF_ANY_CALL = (
    linear_regression(list(gains.INSTANT_BATCH_SECONDS), list(gains.INSTANT_BATCH_SECONDS.values())).intercept
    / gains.INSTANT_BATCH_SECONDS[1]
)
"""What of a picture's time does not grow with the batch: where the line through those seconds begins."""
