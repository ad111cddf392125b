"""Full-size pipelines as they were measured: with DDIM, without text encoders unless asked for, on meta unless told."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch

from diffusers_turbo.bench.architectures import build
from diffusers_turbo.bench.schedulers import set_scheduler
from diffusers_turbo.facts.pipeline import PipelineFacts, read_pipeline

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def measured(name: str, dtype: torch.dtype, device: str = "meta", *, text_encoders: bool = False) -> Any:
    """One architecture in the state in which its peaks were measured."""
    pipe = build(name, dtype=dtype, device=device, text_encoders=text_encoders)
    set_scheduler(pipe, "ddim")
    return pipe


def sd15() -> Any:
    """SD1.5 without its text encoder."""
    return measured("sd15", torch.float16)


def without_exact_tiles(facts: PipelineFacts) -> PipelineFacts:
    """The same with an autoencoder that only decodes in lossy tiles, as most do."""
    assert facts.vae is not None
    return dataclasses.replace(facts, vae=dataclasses.replace(facts.vae, can_tile_exactly=False))


@functools.cache
def facts_of(name: str, dtype: str = "float16") -> PipelineFacts:
    """The facts of one architecture; read once, since they are frozen."""
    return read_pipeline(measured(name, _DTYPES[dtype]))
