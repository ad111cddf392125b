"""Verdict on the denoising loop without waiting: for known schedulers on CUDA."""

from __future__ import annotations

from .options import SYNC_FREE_SCHEDULERS, SyncFreeLoop
from .request import Situation, Verdict, leave

_WAITS = {
    "DDIMScheduler": "at each step, for the timestep",
    "PNDMScheduler": "at each step, for the timestep",
    "LCMScheduler": "at each step, for the timestep",
    "UniPCMultistepScheduler": "many times at each step, for what it solves",
    "EulerAncestralDiscreteScheduler": "at each step when its noise comes from a CPU generator",
}
"""When diffusers' own loop waits for the GPU. Source: `tests/schedulers/test_never_waits.py`, where each is caught."""

_WAITS_ONCE = "once a picture, unless the pipeline says where the loop begins"


def judge_loop(situation: Situation) -> Verdict:
    """Decide on the loop without waiting: what was not measured is left to the user."""
    name, device, option = situation.pipeline.scheduler, situation.device, SyncFreeLoop()
    if device.device_type == "cpu":
        return leave(option, f"On {device.name} host and device are one: there is nothing to wait for.")
    if device.device_type != "cuda":
        return leave(option, f"It was made for CUDA and not tried on {device.name}.")
    if name is None:
        return leave(option, f"{situation.pipeline.class_name} has no scheduler.")
    if name not in SYNC_FREE_SCHEDULERS:
        return leave(option, f"{name} is not among the schedulers it knows: {', '.join(SYNC_FREE_SCHEDULERS)}.")
    waits = f"{name} makes the host wait for the GPU {_WAITS.get(name, _WAITS_ONCE)}"
    # a plan throws only what was run and measured on a GPU
    return leave(option, f"{waits}; this package has not measured what it spares on a GPU yet.")
