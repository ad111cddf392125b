"""The whole story: give a pipeline its switches, or let a plan throw them.

turbo(pipe)            the same object, now also a TurboMixin; nothing else changes
auto_optimize(pipe)    facts (device, pipeline) -> plan -> apply -> report
"""

from __future__ import annotations

import functools
import logging
import os
from dataclasses import replace
from typing import Any, TypeVar

import torch

from .actions.apply import apply_plan
from .actions.ledger import close_ledger, open_ledger
from .attention import best_memory_efficient
from .facts.device import probe
from .facts.pipeline import execution_device, require_pipeline
from .facts.probing import require_device
from .mixin import TurboMixin
from .planning.memory import estimate_memory
from .planning.planner import plan as make_plan
from .planning.timing import STEPS, moves_weights
from .prediction.where_tight import PredictWhereTight
from .verification.blame import settle
from .verification.check import Yardstick
from .verification.inputs import make_inputs

PipeT = TypeVar("PipeT")

ENVIRONMENT_VARIABLE = "USE_MEMORY_EFFICIENT_ATTENTION"

logger = logging.getLogger("diffusers_turbo")


def turbo(pipe: PipeT) -> PipeT:
    """Give a diffusers pipeline this package's switches and return the same object.

    Nothing changes until a switch is thrown: the output is bit-identical, the class is still the pipeline's own to
    `isinstance`, and saving, copying and pickling work as before. Calling it twice is calling it once. With the
    environment variable USE_MEMORY_EFFICIENT_ATTENTION=1 the best memory-efficient attention there is comes on at
    once.

    Raises:
        NotSupportedError: `pipe` is no diffusers pipeline, or has no denoiser.
    """
    require_pipeline(pipe, "turbo(pipe)")
    if not isinstance(pipe, TurboMixin):
        object.__setattr__(pipe, "__class__", turbo_class(type(pipe)))  # type: ignore[arg-type]
        if os.environ.get(ENVIRONMENT_VARIABLE) == "1":
            _enable_memory_efficient_attention(pipe)
    return pipe


def auto_optimize(
    pipe: PipeT,
    *,
    device: str | torch.device | None = None,
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
    verify: bool = False,
) -> PipeT:
    """Probe the device, plan what is safe and worth it, apply it, and keep the plan for `pipe.turbo_report()`.

    Args:
        pipe: any diffusers pipeline with a `unet` or `transformer`.
        device: where it shall run, such as "cuda:1". Left out, that is where it is, or this machine's accelerator for
            one that lies in host memory as `from_pretrained` leaves it: components move there whole, or as the plan's
            offload brings them, so that a pipeline larger than the card needs no `.to("cuda")` that would fail.
        height, width: size of the pictures in pixels; by default the model's own.
        batch_size: pictures per call.
        steps: denoising steps of a call: the fewer, the less offload by layers costs beside offload by models.
        images: how many pictures will be made in all; decides whether compiling pays.
        vram_budget: bytes, or text such as "6GB"; by default what is free.
        dtype: "keep", "auto" (half precision where it is safe), or a name such as "float16". A change of dtype is
            lossy.
        exact: allow exact levers only.
        tier: "instant" (CUDA graphs and all that goes with them, a first picture in seconds), "compiled" (torch.compile
            under the graphs), "fastest" (one of the two, by `images`) or "none". Left out, it is "fastest" for models
            it was measured with (SD1.5, SD2.1, SDXL in half precision), and none for others.
        cache_dir: where code that the plan compiles is kept, so that the next process finds it: True for the user's
            folder of caches, or a folder; see `compile_unet`.
        verify: draw a few pictures with the reference and with the plan applied; steps that break what the plan
            promises are taken off and named in the report. Takes the time of some dozens of pictures, and the memory
            of an fp32 copy.

    Raises:
        InvalidOptionError: an argument is none, or the device is not here.
        TurboError: the plan could not be applied; the pipeline is as it was.
    """
    turbo(pipe)
    if device is not None:
        require_device(device)
    there = execution_device(pipe)
    place = _place_to_run(pipe, there) if device is None else torch.device(device)
    facts = probe(place)
    # the allocator's rules that a prediction follows are CUDA's
    estimates = PredictWhereTight(pipe, facts, vram_budget) if facts.device_type == "cuda" else estimate_memory
    chosen = make_plan(
        pipe,
        facts,
        height=height,
        width=width,
        batch_size=batch_size,
        steps=steps,
        images=images,
        vram_budget=vram_budget,
        dtype=dtype,
        exact=exact,
        tier=tier,
        cache_dir=cache_dir,
        estimates=estimates,
    )
    # before anything is switched on, so that no fault of a switch can reach the reference
    yardstick = None
    if verify:
        inputs = make_inputs(height=height, width=width, batch_size=batch_size)
        yardstick = Yardstick(pipe, inputs, device=place)
    ledger = open_ledger(pipe)
    try:
        if not _same_device(place, there) and not moves_weights(step.typed_options() for step in chosen.steps):
            ledger.bring(pipe, place)
            told = f"moved from {there} to {place}; turbo_undo() moves it back"
            chosen = replace(chosen, notes=(*chosen.notes, told))
        apply_plan(pipe, chosen)
    except BaseException:
        ledger.bring_back(pipe)
        close_ledger(pipe)
        raise
    verification = None
    if yardstick is not None:
        settlement = settle(pipe, chosen, yardstick)
        chosen, verification = settlement.plan, settlement.verification
        for guilty in settlement.guilty:
            logger.warning("%s: %s", guilty.step.action, guilty.reason)
    ledger.plan, ledger.verification = chosen, verification
    return pipe


def _place_to_run(pipe: Any, there: torch.device) -> torch.device:
    """Return the device the pipeline computes on, or the accelerator if it just lies where it was loaded."""
    loaded = there.type == "cpu" and pipe.device.type == "cpu" and getattr(pipe, "hf_device_map", None) is None
    if loaded and torch.accelerator.is_available():
        return torch.accelerator.current_accelerator() or there
    return there


def _same_device(one: torch.device, other: torch.device) -> bool:
    """Whether two names mean one device: "cuda" is the current one of its kind."""
    current = torch.accelerator.current_device_index() if torch.accelerator.is_available() else 0
    indices = {current if device.index is None else device.index for device in (one, other)}
    return one.type == other.type and len(indices) == 1


@functools.cache
def turbo_class(host: type) -> type:
    """Return the class a pipeline of class `host` gets: `host` with TurboMixin in front, under the same name.

    The name is kept because diffusers writes it into `model_index.json`.
    """
    namespace = {"__module__": host.__module__, "__qualname__": host.__qualname__, "__doc__": host.__doc__}
    return type(host.__name__, (_MadeAtRunTime, TurboMixin, host), namespace)


class _MadeAtRunTime:
    """Lets instances of a class that no module holds be copied and pickled."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _revive, (type(self).__bases__[-1],), self.__getstate__()


def _revive(host: type) -> Any:
    """Make an empty turbo pipeline over `host`, for `copy` and `pickle` to fill."""
    made = turbo_class(host)
    return object.__new__(made)


def _enable_memory_efficient_attention(pipe: Any) -> None:
    best = best_memory_efficient(execution_device(pipe))
    getattr(pipe, best)()
    logger.info("%s=1: %s()", ENVIRONMENT_VARIABLE, best)
