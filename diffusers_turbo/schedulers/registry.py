"""Which schedulers have a loop that never waits."""

from __future__ import annotations

from typing import Any

from .euler_ancestral import EulerAncestralLoop
from .given_noise import DDIMLoop, DPMSolverLoop
from .lcm import LCMLoop
from .loop import FlowMatchLoop, HostLoop, ScalingLoop
from .unipc import UniPCLoop

LOOPS: dict[str, type[HostLoop]] = {
    "DDIMScheduler": DDIMLoop,
    "PNDMScheduler": HostLoop,
    "EulerDiscreteScheduler": ScalingLoop,
    "EulerAncestralDiscreteScheduler": EulerAncestralLoop,
    "DPMSolverMultistepScheduler": DPMSolverLoop,
    "UniPCMultistepScheduler": UniPCLoop,
    "LCMScheduler": LCMLoop,
    "FlowMatchEulerDiscreteScheduler": FlowMatchLoop,
}
"""Class name in diffusers -> its loop. Only the class itself: a subclass may step in a way of its own."""


def refusals(scheduler: Any) -> list[str]:
    """Return why a scheduler can't be given a loop; an empty list means it can."""
    name = type(scheduler).__name__
    if name not in LOOPS or not type(scheduler).__module__.startswith("diffusers."):
        return [f"a {name}, whose steps this package does not know"]
    return [
        f"a {name} whose {method} was replaced already (by this switch on a pipeline that shares it, or by others)"
        for method in LOOPS[name].methods
        if method in vars(scheduler)
    ][:1]
