"""What tests of the memory fallback share: components that run out of memory until there is room, and who makes it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

Pipe = Any
MESSAGE = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1.00 GiB"


@dataclass
class Starved:
    """A module whose call runs out of memory, from its call `at` on, until there is room."""

    room: Callable[[], bool]
    at: int = 1
    error: Callable[[], Exception] = lambda: torch.OutOfMemoryError(MESSAGE)
    calls: int = 0
    failures: int = 0
    activations: list[weakref.ref] = field(default_factory=list)
    pinned: list[bool] = field(default_factory=list)
    kept: list[Exception] = field(default_factory=list)

    def install(self, monkeypatch: pytest.MonkeyPatch, module: nn.Module) -> Starved:
        """Stand in for this module's forward; before any offload, whose hooks keep the forward that they find."""
        forward = type(module).forward

        def starved(this: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if this is not module:
                return forward(this, *args, **kwargs)
            self.calls += 1
            self.pinned += [ref() is not None for ref in self.activations]
            if self.calls < self.at or self.room():
                return forward(this, *args, **kwargs)
            self.failures += 1
            activation = torch.zeros(64, 64)
            self.activations.append(weakref.ref(activation))
            self.kept.append(self.error())  # as a debugger or a log may hold it
            raise self.kept[-1]

        monkeypatch.setattr(type(module), "forward", starved)
        return self


def once(failures: int = 1) -> Callable[[], bool]:
    """Room after so many failures."""
    left = [failures]

    def room() -> bool:
        left[0] -= 1
        return left[0] < 0

    return room


def on(pipe: Pipe, action: str, **options: Any) -> Callable[[], bool]:
    """Room once this switch is in force."""

    def room() -> bool:
        levers = [lever for lever in pipe.turbo_report().levers if lever.in_force and lever.action == action]
        return any(options.items() <= lever.options.items() for lever in levers)

    return room


def part(pipe: Pipe, stage: str) -> nn.Module:
    if stage == "denoiser":
        return pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    return {"decode": pipe.vae.decoder, "encode": pipe.vae.encoder}.get(stage) or getattr(pipe, stage)


def actions(pipe: Pipe) -> list[str]:
    return [lever.action for lever in pipe.turbo_report().levers if lever.in_force]


def offload(pipe: Pipe, given: str) -> None:
    """Switch on what the user had on already."""
    if given == "model":
        pipe.enable_model_cpu_offload(device="cpu")
    elif given == "block":
        pipe.enable_group_offload("cpu")
