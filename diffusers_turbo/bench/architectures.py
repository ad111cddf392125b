"""Full-size pipelines made from config with random weights: speed and memory without a download.

What a model takes in time and memory follows from its config alone; its pictures are noise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..errors import InvalidOptionError, explain_failure
from .model_configs import ARCHITECTURES, Architecture
from .parts import make_part, seeded
from .reading import what_to_choose
from .schedulers import make_scheduler
from .text_encoders import make_tokenizer

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["ARCHITECTURES", "Architecture", "assemble", "build", "find"]


def build(
    name: str, *, dtype: torch.dtype, device: str | torch.device, seed: int = 0, text_encoders: bool = True
) -> DiffusionPipeline:
    """Make the pipeline of an architecture with random weights, in `dtype` on `device` from the start.

    On "meta" it has shapes and no weights. Without `text_encoders` it has no tokenizers either: give prompt embeddings.

    Raises:
        InvalidOptionError: no architecture has this name.

    >>> build("sd15", dtype=torch.float16, device="meta").unet.num_parameters()
    859520964
    """
    return assemble(find(name), dtype=dtype, device=device, seed=seed, text_encoders=text_encoders)


def find(name: str) -> Architecture:
    """Return the architecture of a short name.

    Raises:
        InvalidOptionError: none has this name.
    """
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    do = what_to_choose(name, ARCHITECTURES, "choose one of these names")
    needed = f"one of {', '.join(ARCHITECTURES)}"
    raise InvalidOptionError(explain_failure("build()", f"architecture = {name!r}", needed, do))


def assemble(
    architecture: Architecture, *, dtype: torch.dtype, device: str | torch.device, seed: int, text_encoders: bool
) -> DiffusionPipeline:
    """Make a pipeline from an architecture's data, which may be a changed copy of a published one."""
    import diffusers

    place = torch.device(device)
    components: dict[str, Any] = {}
    with seeded(seed, place):
        # denoiser and VAE first: they are the same with and without text encoders
        for attribute, part in architecture.models.items():
            components[attribute] = make_part(part, dtype, place)
        for attribute, encoder in architecture.text_encoders.items():
            wanted = encoder if text_encoders else None
            components[attribute] = wanted and make_part(wanted, dtype, place)
            components[attribute.replace("text_encoder", "tokenizer")] = wanted and make_tokenizer(wanted)
    # outside of any device or dtype: schedulers keep their tables on the CPU in float32
    scheduler = make_scheduler(architecture.scheduler, architecture.scheduler_config)
    cls: Any = getattr(diffusers, architecture.pipeline)
    pipe: DiffusionPipeline = cls(**components, scheduler=scheduler, **architecture.arguments)
    pipe.set_progress_bar_config(disable=True)
    return pipe
