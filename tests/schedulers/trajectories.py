"""Whole trajectories of a scheduler and a stand-in for a model: the host's own, and ours with its loop put on."""

from __future__ import annotations

import copy
from typing import Any

import diffusers
import torch

from diffusers_turbo.schedulers import staging
from diffusers_turbo.schedulers.loop import LoopMethod
from diffusers_turbo.schedulers.registry import LOOPS

BASE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
STABLE_DIFFUSION = {
    "DDIMScheduler": {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1},
    "PNDMScheduler": {"skip_prk_steps": True, "steps_offset": 1},
}


def make(name: str, **config: Any) -> Any:
    """A scheduler of this class, for Stable Diffusion's noise schedule."""
    base = {} if name.startswith("FlowMatch") else BASE
    return getattr(diffusers, name)(**{**base, **STABLE_DIFFUSION.get(name, {}), **config})


def put_on(scheduler: Any) -> Any:
    """Give a scheduler its loop, as the switch does."""
    loop = LOOPS[type(scheduler).__name__](scheduler)
    for method in loop.methods:
        setattr(scheduler, method, LoopMethod(loop, method))
    return scheduler


def model(sample: torch.Tensor, timestep: Any) -> torch.Tensor:
    """A smooth stand-in for a denoiser whose output depends on sample and timestep."""
    wide = sample.double()
    return (torch.sin(3 * wide) + 0.3 * wide.roll(1, -1) + torch.cos(timestep.double() / 100)).to(sample.dtype) * 0.7


def start(batch: int = 1, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Latents `[B, 4, 8, 8]`."""
    return torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)


def run(scheduler: Any, sample: torch.Tensor, steps: int, *, begin: int = 0, **arguments: Any) -> list[torch.Tensor]:
    """Denoise as a pipeline does; return the sample after every step."""
    scheduler.set_timesteps(steps, device=sample.device)
    timesteps = scheduler.timesteps[begin:]
    if begin and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    if not begin:
        sample = (sample * getattr(scheduler, "init_noise_sigma", 1.0)).to(sample.dtype)
    found = []
    for t in timesteps:
        scaled = scheduler.scale_model_input(sample, t) if hasattr(scheduler, "scale_model_input") else sample
        sample = scheduler.step(model(scaled, t), t, sample, **arguments, return_dict=False)[0]
        found.append(sample)
    return found


def lockstep(one: Any, other: Any, sample: torch.Tensor, steps: int, **arguments: Any) -> list[float]:
    """Let two schedulers step from the same samples, those of the first; return how far apart they are each time."""
    for scheduler in (one, other):
        scheduler.set_timesteps(steps, device=sample.device)
    apart, sample = [], (sample * one.init_noise_sigma).to(sample.dtype)
    for t, own in zip(one.timesteps, other.timesteps, strict=True):
        output = model(one.scale_model_input(sample, t), t)
        other.scale_model_input(sample, own)
        given = {name: copy.deepcopy(value) for name, value in arguments.items()}
        state = torch.get_rng_state()
        ours = other.step(output, own, sample, **given)
        torch.set_rng_state(state)
        theirs = one.step(output, t, sample, **arguments)
        assert type(ours) is type(theirs)
        assert ours.prev_sample.dtype == theirs.prev_sample.dtype
        apart.append(max(relative(ours[name], theirs[name]) for name in theirs))
        sample = theirs.prev_sample
    return apart


def pretend_elsewhere(monkeypatch: Any) -> None:
    """Take host memory for a device, so that everything made for a GPU runs here, with numbers to compare."""
    monkeypatch.setattr("diffusers_turbo.schedulers.unipc.UniPCLoop.waits", lambda loop, sample: True)
    for module in ("given_noise", "lcm", "euler_ancestral"):
        monkeypatch.setattr(f"diffusers_turbo.schedulers.{module}.draws_on_host", _from_host)
    monkeypatch.setattr(staging, "PINNED_FOR", ("cpu",))
    monkeypatch.setattr(staging, "page_locked", lambda size: torch.empty(size, dtype=torch.uint8))


def _from_host(generator: Any, device: torch.device) -> bool:
    return generator is not None


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """|ours - theirs| / |theirs|."""
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())
