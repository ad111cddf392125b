"""One scheduler's denoising loop with the host's clock: its own methods, given timesteps that need not be read back."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import staging
from .host_index import HostTimesteps


class HostLoop:
    """The methods of a scheduler as a loop without waiting calls them.

    Tables (`alphas_cumprod`, `sigmas`) are in host memory, and a number from there times a tensor of the device costs
    no waiting. So it is enough to give the host's own method the timestep as the host has it, and to let it look
    timesteps up in host memory.
    """

    methods: ClassVar[tuple[str, ...]] = ("set_timesteps", "step")
    """The scheduler's methods that this class has one of its own for."""

    travels: ClassVar[tuple[str, ...]] = ("timesteps",)
    """What `set_timesteps(device=...)` leaves on the device."""

    only_searches: ClassVar[bool] = False
    """Whether the host's methods ask for the timestep only to find the first index, and count from there."""

    floats_only: ClassVar[bool] = False
    """Whether the host's `step` refuses integer timesteps in host memory (on a device it does not notice them)."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.times = HostTimesteps()
        self.staging = staging.Staging()

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        """Let the host compute its timesteps in host memory, keep them, and send a copy to the device."""
        scheduler, host = self.scheduler, self.host_method("set_timesteps")
        given = self.arguments("set_timesteps", args, kwargs)
        device = given.get("device")
        if device is None or not staging.is_elsewhere(torch.device(device)) or not self.only_moves():
            host(*args, **kwargs)
            self.times.hold(scheduler.timesteps, scheduler.timesteps.cpu())
        else:
            host(**given | {"device": "cpu"})
            on_host = scheduler.timesteps
            self.staging.restart(2 * len(self.travels))
            for name in self.travels:
                setattr(scheduler, name, self.staging.to_device(getattr(scheduler, name), torch.device(device)))
            self.times.hold(scheduler.timesteps, on_host)
        self.staging.restart(len(scheduler.timesteps))

    def only_moves(self) -> bool:
        """Whether `set_timesteps` computes nothing on the device, so that host memory gives the same bits."""
        return True

    def scale_model_input(self, *args: Any, **kwargs: Any) -> Any:
        """Scale with the timestep as the host has it."""
        return self.call("scale_model_input", args, kwargs)

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Step with the timestep as the host has it."""
        return self.call("step", args, kwargs)

    def call(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a method of the scheduler; as it is when the timestep is none of `scheduler.timesteps`."""
        scheduler, host = self.scheduler, self.host_method(name)
        plain = len(args) <= 3 and kwargs.get("generator") is None
        if self.only_searches and plain and scheduler.step_index is not None:
            return host(*args, **kwargs)
        given = self.arguments(name, args, kwargs)
        timestep = self.times.value(scheduler.timesteps, given.get("timestep"))
        if timestep is None or (self.floats_only and not timestep.is_floating_point()):
            return host(*args, **kwargs)
        # the host searches the timesteps, and reads the one that comes next
        on_device, scheduler.timesteps = scheduler.timesteps, self.times.on_host
        try:
            return self.compute(name, {**given, "timestep": timestep})
        finally:
            scheduler.timesteps = on_device

    def compute(self, name: str, given: dict[str, Any]) -> Any:
        """Run a method with its arguments by name, the timestep in host memory: by default the host's own."""
        return self.host_method(name)(**given)

    def host_method(self, name: str) -> Callable[..., Any]:
        """Return a method as the scheduler's class defines it."""
        method: Callable[..., Any] = getattr(type(self.scheduler), name).__get__(self.scheduler)
        return method

    def arguments(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of a call by name."""
        names = _parameters(getattr(type(self.scheduler), name))
        if len(args) > len(names) or not kwargs.keys().isdisjoint(names[: len(args)]):
            # no such call: the host's own method says so
            inspect.signature(self.host_method(name)).bind(*args, **kwargs)
        return {**dict(zip(names, args, strict=False)), **kwargs}


class ScalingLoop(HostLoop):
    """Euler: `scale_model_input` is the first to look for the timestep's index."""

    methods = ("set_timesteps", "scale_model_input", "step")
    only_searches = True
    floats_only = True

    def only_moves(self) -> bool:
        """Tell whether logarithms are taken on the device, which continuous timesteps are made of."""
        config = self.scheduler.config
        return not (config.get("timestep_type") == "continuous" and config.prediction_type == "v_prediction")


class FlowMatchLoop(HostLoop):
    """Flow matching: its sigmas live on the device too, and stay there; nothing reads them back."""

    travels = ("timesteps", "sigmas")
    only_searches = True
    floats_only = True


class LoopMethod:
    """Stands in for a scheduler's method, with its name and signature; can be copied and pickled with it."""

    def __init__(self, loop: HostLoop, name: str) -> None:
        self.loop, self.name = loop, name
        functools.update_wrapper(self, getattr(type(loop.scheduler), name))
        # the function wrapped is that of the class, which takes `self` as well
        del vars(self)["__wrapped__"]

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.loop.host_method(self.name))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the loop's own version."""
        return getattr(self.loop, self.name)(*args, **kwargs)


@functools.lru_cache(maxsize=64)
def _parameters(method: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(method).parameters)[1:]


def weighted_sum(*terms: tuple[float, Tensor]) -> Tensor:
    """Add up tensors with weights in float32 (float64 for float64), one kernel a term; the weights stay on the host."""
    (weight, first), *others = terms
    wide = first.dtype if first.dtype in (torch.float32, torch.float64) else torch.float32
    total = first.to(wide) * weight
    for weight, tensor in others:
        total = torch.add(total, tensor, alpha=weight)
    return total
