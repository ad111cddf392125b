"""On a device whose values can't be read, stock schedulers fail or wait; the same ones with their loop do not."""

from __future__ import annotations

import pytest
import torch

from diffusers_turbo.schedulers.registry import LOOPS
from tests.schedulers.trajectories import make, put_on
from tests.schedulers.unreadable import DEVICE, READS, Waits, loop, make_readable_as_gpu, with_timesteps_sent


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


# scheduler, config, arguments of step, copies a loop of six steps makes
CASES = {
    "ddim": ("DDIMScheduler", {}, {}, 0),
    "ddim, thresholds": ("DDIMScheduler", {"clip_sample": True, "prediction_type": "v_prediction"}, {}, 0),
    "ddim, eta": ("DDIMScheduler", {}, {"eta": 1.0, "generator": generator}, 6),
    "plms": ("PNDMScheduler", {}, {}, 0),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": False}, {}, 0),
    "euler": ("EulerDiscreteScheduler", {}, {}, 0),
    "euler, karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, {"generator": generator}, 0),
    "euler a": ("EulerAncestralDiscreteScheduler", {}, {"generator": generator}, 6),
    "euler a, v": ("EulerAncestralDiscreteScheduler", {"prediction_type": "v_prediction"}, {"generator": generator}, 6),
    "euler a, list": (
        "EulerAncestralDiscreteScheduler",
        {},
        {"generator": lambda: [generator(), generator()]},
        6,
    ),
    "euler a, no generator": ("EulerAncestralDiscreteScheduler", {}, {}, 0),
    "dpm++": ("DPMSolverMultistepScheduler", {}, {}, 0),
    "dpm++, karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True, "solver_order": 3}, {}, 0),
    "dpm++, sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, {"generator": generator}, 6),
    "unipc": ("UniPCMultistepScheduler", {}, {}, 0),
    "unipc, order 3": ("UniPCMultistepScheduler", {"solver_order": 3}, {}, 0),
    "unipc, bh1": (
        "UniPCMultistepScheduler",
        {"solver_type": "bh1", "final_sigmas_type": "sigma_min", "predict_x0": False},
        {},
        0,
    ),
    "lcm": ("LCMScheduler", {}, {"generator": generator}, 5),
    "lcm, no generator": ("LCMScheduler", {}, {}, 0),
    "flow": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, {}, 0),
}


def given(arguments):
    return {name: value() if callable(value) else value for name, value in arguments.items()}


@pytest.mark.parametrize("case", CASES)
def test_the_host_waits_and_we_do_not(case, monkeypatch):
    name, config, arguments, copies = CASES[case]
    stock = Waits()
    try:
        loop(with_timesteps_sent(make(name, **config)), stock, **given(arguments))
    except READS as error:
        stock.found.append(str(error))
    assert stock.found, "the stock scheduler was to be caught waiting"

    ours = Waits()
    make_readable_as_gpu(ours, monkeypatch)
    scheduler = put_on(make(name, **config))
    for begin in (0, 0, 2):
        loop(scheduler, ours, begin=begin, **given(arguments))
        assert ours.found == []
    assert ours.sent == copies + copies + max(0, copies - 2)


@pytest.mark.parametrize("name", LOOPS)
def test_every_scheduler_is_tried(name):
    assert any(name == case[0] for case in CASES.values())


def test_pages_are_locked_once_a_loop(monkeypatch):
    waits = Waits()
    make_readable_as_gpu(waits, monkeypatch)
    scheduler = put_on(make("EulerAncestralDiscreteScheduler"))
    scheduler.set_timesteps(6, device=DEVICE)
    before = len(waits.page_locked)
    sample = torch.empty(2, 4, 8, 8, device=DEVICE)
    blocks = set()
    for t in scheduler.timesteps:
        scheduler.scale_model_input(sample, t)
        scheduler.step(sample, t, sample, generator=generator())
        blocks.add(id(scheduler.step.loop.staging.block))
    assert (before, len(blocks)) == (1, 1)


@pytest.mark.parametrize("name", ["DDIMScheduler", "LCMScheduler", "PNDMScheduler"])
def test_tables_that_add_noise_moved_are_not_read_back(name, monkeypatch):
    """Image-to-image: the host's add_noise leaves its table of alphas on the device."""
    waits = Waits()
    make_readable_as_gpu(waits, monkeypatch)
    scheduler = put_on(make(name))
    arguments = {"generator": generator()} if name == "LCMScheduler" else {}
    for _ in range(2):
        scheduler.set_timesteps(6, device=DEVICE)
        noised = torch.empty(2, 4, 8, 8, device=DEVICE)
        scheduler.add_noise(noised, noised, torch.full((2,), 500, device=DEVICE))
        assert scheduler.alphas_cumprod.device == DEVICE
        sample = noised
        with waits:
            for t in scheduler.timesteps[2:]:
                sample = scheduler.step(torch.empty_like(sample), t, sample, **arguments).prev_sample
    assert waits.found == []


def test_the_measure_sees_what_waits():
    waits = Waits()
    here = torch.ones(3)
    with waits:
        here.to(DEVICE)
        here.to(DEVICE, non_blocking=True)
        torch.empty(3, device=DEVICE).copy_(here)
        torch.linalg.solve(torch.ones(2, 2, device=DEVICE), torch.ones(2, device=DEVICE))
        here[1] * torch.empty(3, device=DEVICE)
        torch.ones((), device=DEVICE)
    assert waits.found == [*["copy of (3,) to the device"] * 3, "_linalg_solve_ex"]
    for read in (torch.Tensor.item, bool, torch.Tensor.nonzero, torch.Tensor.cpu):
        with pytest.raises(READS):
            read(torch.empty(1, device=DEVICE))
