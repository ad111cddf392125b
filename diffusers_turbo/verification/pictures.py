"""Run a pipeline over the inputs of a verification and keep the decoded pictures and the final latents."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..actions.undo import Journal
from ..facts.pipeline import require_pipeline
from .inputs import Inputs
from .replay import Tape


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Pictures `[P, 3, H, W]` in [0, 1] and final latents, float on the CPU; latents are None where not to be had."""

    pictures: Tensor
    latents: Tensor | None


def record_pictures(pipe: Any, inputs: Inputs) -> tuple[Pictures, list[Tape]]:
    """Make the pictures and keep what each call prepared."""
    tapes: list[Tape] = []

    def scope(generators: list[torch.Generator]) -> AbstractContextManager[None]:
        tapes.append(Tape())
        return tapes[-1].recording(pipe, generators)

    return _make(pipe, inputs, scope), tapes


def replay_pictures(pipe: Any, inputs: Inputs, tapes: list[Tape]) -> Pictures:
    """Make the pictures from what `record_pictures` kept, in the dtype of this pipeline's denoiser."""
    remaining, dtype = iter(tapes), denoiser_dtype(pipe)
    return _make(pipe, inputs, lambda generators: next(remaining).replaying(pipe, generators, dtype))


def denoiser_dtype(pipe: Any) -> torch.dtype:
    """Return the dtype the pipeline denoises in."""
    dtype = getattr(pipe, require_pipeline(pipe, "verifying")).dtype
    assert isinstance(dtype, torch.dtype)
    return dtype


def _make(
    pipe: Any, inputs: Inputs, scope: Callable[[list[torch.Generator]], AbstractContextManager[None]]
) -> Pictures:
    accepted = inspect.signature(type(pipe).__call__).parameters
    finals: list[Tensor] = []
    pictures: list[Tensor] = []
    last: dict[str, Tensor] = {}

    def keep(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        last["latents"] = tensors["latents"]
        return tensors

    given = {
        "height": inputs.height,
        "width": inputs.width,
        "guidance_scale": inputs.guidance_scale,
        "callback_on_step_end": keep,
    }
    given = {name: value for name, value in given.items() if value is not None and name in accepted}
    with _quiet(pipe):
        for prompts, seeds in inputs.batches():
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            with scope(generators):
                output = pipe(
                    prompts,
                    num_inference_steps=inputs.steps,
                    generator=generators,
                    output_type="pt",
                    **given,
                    **inputs.more(len(prompts)),
                )
            pictures.append(output.images.float().cpu())
            if last:
                finals.append(last.pop("latents").float().cpu())
    return Pictures(pictures=torch.cat(pictures), latents=torch.cat(finals) if finals else None)


@contextmanager
def _quiet(pipe: Any) -> Iterator[None]:
    """Hide the pipeline's own progress bar for a while: the caller shows one over all pictures."""
    journal = Journal()
    journal.set_attribute(pipe, "_progress_bar_config", {**vars(pipe).get("_progress_bar_config", {}), "disable": True})
    try:
        yield
    finally:
        journal.revert()
