"""A component of a pipeline as data, and the model with random weights made from it."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class Part:
    """One model of a pipeline: its class by name, and the config that it is published with.

    Attributes:
        library: "diffusers" or "transformers".
        class_name: the class in that library.
        config: what its constructor is given; what is left out is the class's default.
    """

    library: str
    class_name: str
    config: Mapping[str, Any]


def make_part(part: Part, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    """Make a model with random weights, initialised in `dtype` on `device`; "meta" takes no memory.

    Never made in float32 first: that would need twice the memory of a 16-bit model.
    """
    cls: Any = getattr(importlib.import_module(part.library), part.class_name)
    with _default_dtype(dtype), device:
        made = cls(cls.config_class(**part.config)) if part.library == "transformers" else cls(**part.config)
    if dtype == torch.float16:
        _keep_in_float32(made)
    model: torch.nn.Module = made.eval()
    return model


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draw from `seed` on the CPU and on `device`, and give the random generators back as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    # process-wide, so held for the constructor only
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _keep_in_float32(model: Any) -> None:
    """Hold in float32 what the class holds there when it is loaded in float16: T5's `wo`, which overflows."""
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, module in model.named_modules():
        if kept & set(name.split(".")):
            module.float()
