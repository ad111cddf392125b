"""What stands before and after the forwards of an offloaded pipeline, in the form accelerate and diffusers know."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .streaming import Unit
from .undo import ABSENT, owned, put

if TYPE_CHECKING:
    from .partial_offload import PartialResidency


@dataclass(eq=False)
class Hook:
    """What accelerate's hooks look like to accelerate and diffusers: called before and after a module's forward."""

    residency: PartialResidency
    execution_device: torch.device
    no_grad: bool = False

    def init_hook(self, module: nn.Module) -> nn.Module:
        """Do nothing: the weights move when they are needed."""
        return module

    def detach_hook(self, module: nn.Module) -> nn.Module:
        """Do nothing: who takes hooks off also says where the weights go."""
        return module

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Prepare a call; the arguments go through."""
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """Look at the end of a call; the output goes through."""
        return output


@dataclass(eq=False)
class ComponentHook(Hook):
    """On a component: it comes when it is called. diffusers calls this before `vae.decode` as well."""

    component: str = ""

    @property
    def will_record(self) -> bool:
        """Whether calls may be recorded once the order of the layers is known."""
        return self.component in self.residency.looped and self.residency.will_record

    @property
    def lets_record(self) -> bool:
        """Whether it brings a component ahead of its call, too, and the call may then be recorded (`bring_of`)."""
        return self.component in self.residency.looped and self.residency.lets_record

    def bring(self) -> None:
        """Bring what stays of the component as long as it works; there already, nothing happens."""
        self.residency.arrive(self.component)
        self.residency.settle()

    def interrupted(self) -> None:
        """End a call that was interrupted while it was recorded, on every stream that takes part in it."""
        self.residency.interrupted()

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Bring the component, and its arguments."""
        from accelerate.utils import send_to_device

        self.residency.arrive(self.component)
        self.residency.begin(self.component)
        return send_to_device(args, self.execution_device), send_to_device(kwargs, self.execution_device)

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """Let go of the last group, after a denoiser's call."""
        self.residency.finish(self.component)
        return output


@dataclass(eq=False)
class UnitHook(Hook):
    """On a layer of the denoiser: its weights come when it is called, if they were not fetched before."""

    unit: Unit | None = None

    @property
    def will_record(self) -> bool:
        """Whether what it does may be recorded once the order of the layers is known."""
        return self.residency.will_record

    @property
    def lets_record(self) -> bool:
        """Whether what it does may be recorded: copies of a fixed order, from page-locked memory."""
        return self.residency.lets_record

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Bring the layer's weights."""
        if self.unit is not None:
            self.residency.enter(self.unit)
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """Send the layer's weights away, unless they belong to a group."""
        if self.unit is not None:
            self.residency.leave(self.unit)
        return output


@dataclass(eq=False)
class Hooked:
    """The modules that carry hooks, and the forwards that were their own before."""

    forwards: list[tuple[nn.Module, Any]] = field(default_factory=list)

    def hang(self, module: nn.Module, hook: Hook) -> None:
        """Hang a hook on a module."""
        from accelerate.hooks import add_hook_to_module

        for name in ("pre_forward", "post_forward"):
            # weights move outside of compiled code
            setattr(hook, name, torch.compiler.disable(getattr(hook, name)))  # type: ignore[no-untyped-call]
        self.forwards.append((module, owned(module, "forward")))
        add_hook_to_module(module, hook)

    def take_off(self, units: Iterable[Unit]) -> None:
        """Take the hooks off layers, as far as they carry any."""
        from accelerate.hooks import remove_hook_from_module

        gone = {unit.module for unit in units}
        for module, forward in self.forwards:
            if module in gone:
                remove_hook_from_module(module)
                # one that was taken back under the hook is nobody's any more
                put(module, "forward", ABSENT if getattr(forward, "lifted", False) else forward)
        self.forwards = [(module, forward) for module, forward in self.forwards if module not in gone]
