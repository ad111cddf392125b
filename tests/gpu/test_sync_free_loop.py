"""On a GPU: no synchronisation between the first step and the last, by torch's own alarm and by a profile."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from diffusers_turbo import turbo
from diffusers_turbo.schedulers.registry import LOOPS
from tests import tiny
from tests.actions.test_sync_free_loop import NAMES, with_scheduler
from tests.schedulers.trajectories import make, put_on, relative, run, start

pytestmark = pytest.mark.gpu

STEPS = 6
WAITING = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
FIRST, LAST = "first step of the loop", "after the last step"

# the host's own methods run here, and their noise is drawn on the device: the same bits
SAME_BITS = ("DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler")


def call(pipe: Any, *, first: Callable[[], None], last: Callable[[], None], generator: Any = None) -> Any:
    """Run one call; `first` when the UNet is asked for the first time, `last` when the last step is done."""
    steps = 0

    def before(module: Any, args: Any) -> None:
        nonlocal steps
        if steps == 0:
            first()
        steps += 1

    def after(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == len(pipe.scheduler.timesteps) - 1:
            last()
        return tensors

    handle = pipe.unet.register_forward_pre_hook(before)
    try:
        return tiny.picture(pipe, steps=STEPS, batch=2, generator=generator, callback_on_step_end=after)
    finally:
        handle.remove()


@contextmanager
def alarm_off():
    """Leave the alarm as it was, whatever happens in between."""
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def on_gpu(name: str, make_pipe: Any = tiny.sd) -> Any:
    pipe = with_scheduler(make_pipe, name).to("cuda", torch.float16)
    tiny.picture(pipe, steps=STEPS, batch=2)  # libraries are loaded and kernels chosen at the first call
    return pipe


def host_generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def with_alarm(pipe: Any) -> None:
    with alarm_off():
        call(
            pipe,
            first=lambda: torch.cuda.set_sync_debug_mode("error"),
            last=lambda: torch.cuda.set_sync_debug_mode("default"),
            generator=host_generator(),
        )


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("make_pipe", [tiny.sd, tiny.sdxl], ids=["sd", "sdxl"])
@pytest.mark.parametrize("name", NAMES)
def test_no_synchronisation_raises_the_alarm(name, make_pipe):
    pipe = on_gpu(name, make_pipe)
    if name in ("DDIMScheduler", "EulerAncestralDiscreteScheduler"):
        with pytest.raises(RuntimeError, match="synchroniz"):
            with_alarm(pipe)
    pipe.enable_sync_free_loop()
    for _ in range(2):
        with_alarm(pipe)


def waits_in_a_profile(pipe: Any) -> list[str]:
    def mark(text: str) -> Callable[[], None]:
        def enter() -> None:
            with record_function(text):
                pass

        return enter

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as taken:
        call(pipe, first=mark(FIRST), last=mark(LAST), generator=host_generator())
        torch.cuda.synchronize()
    events = list(taken.events())
    begin = max(event.time_range.end for event in events if event.name == FIRST)
    end = min(event.time_range.start for event in events if event.name == LAST)
    assert begin < end
    inside = [event for event in events if begin <= event.time_range.start < end]
    assert any(event.name.startswith("cudaLaunchKernel") for event in inside), "the profile holds no runtime calls"
    return [event.name for event in inside if event.name in WAITING]


@pytest.mark.parametrize("name", NAMES)
def test_no_synchronisation_in_a_profile(name):
    pipe = on_gpu(name)
    stock = waits_in_a_profile(pipe)
    pipe.enable_sync_free_loop()
    waits_in_a_profile(pipe)
    ours = waits_in_a_profile(pipe)
    print(f"{name}: {len(stock)} synchronisations in {STEPS} steps before, {len(ours)} with the lever")
    assert ours == []
    # Euler waits before the model runs for the first time, which is before the window looked at
    assert stock or name == "EulerDiscreteScheduler"


@pytest.mark.parametrize("drawn", ["on the host", "on the host, a list", "on the device"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", LOOPS)
def test_values_are_the_hosts(name, dtype, drawn):
    def go(scheduler: Any) -> torch.Tensor:
        arguments: dict[str, Any] = {}
        torch.manual_seed(0)
        if name in ("EulerAncestralDiscreteScheduler", "LCMScheduler", "DDIMScheduler"):
            arguments["generator"] = {
                "on the host": host_generator,
                "on the host, a list": lambda: [host_generator(), torch.Generator().manual_seed(1)],
                "on the device": lambda: torch.Generator("cuda").manual_seed(0),
            }[drawn]()
        if name == "DDIMScheduler":
            arguments["eta"] = 0.7
        return run(scheduler, start(2, dtype).cuda(), 10, **arguments)[-1]

    stock, ours = go(make(name)), go(put_on(make(name)))
    if name in SAME_BITS or name.startswith("FlowMatch") or (drawn == "on the device" and name[:3] != "Uni"):
        assert torch.equal(ours, stock)
    else:
        assert relative(ours, stock) < (1e-4 if dtype == torch.float32 else 3e-2)


def test_noise_staged_in_one_call_is_not_overwritten_by_the_next():
    """Calls that are not waited for in between each get their own noise."""
    pipe = turbo(on_gpu("EulerAncestralDiscreteScheduler"))
    pipe.enable_sync_free_loop()
    text = {"prompt": ["red cat"] * 2, "num_inference_steps": STEPS, "output_type": "latent"}
    latents = torch.randn(2, 4, 8, 8, generator=host_generator()).to("cuda", torch.float16)

    def picture(seed: int) -> torch.Tensor:
        return pipe(**text, latents=latents, generator=torch.Generator().manual_seed(seed)).images

    apart = []
    for seed in range(4):
        apart.append(picture(seed))
        torch.cuda.synchronize()
    together = [picture(seed) for seed in range(4)]
    assert all(torch.equal(one, other) for one, other in zip(together, apart, strict=True))
