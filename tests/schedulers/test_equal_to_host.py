"""The loop without waiting makes the host's numbers: to the bit where the host's methods run, else up to rounding."""

from __future__ import annotations

import numpy
import pytest
import torch

from diffusers_turbo.schedulers.registry import LOOPS
from tests.schedulers.trajectories import lockstep, make, model, pretend_elsewhere, put_on, relative, run, start

NAMES = [name for name in LOOPS if not name.startswith("FlowMatch")]

CONFIGS = [
    ("DDIMScheduler", {}),
    ("DDIMScheduler", {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "clip_sample": True}),
    ("DDIMScheduler", {"prediction_type": "sample", "timestep_spacing": "linspace", "thresholding": True}),
    ("DDIMScheduler", {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}),
    ("PNDMScheduler", {}),
    ("PNDMScheduler", {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}),
    ("PNDMScheduler", {"skip_prk_steps": False}),
    ("EulerDiscreteScheduler", {}),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True, "timestep_spacing": "leading", "steps_offset": 1}),
    ("EulerDiscreteScheduler", {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}),
    ("EulerDiscreteScheduler", {"prediction_type": "v_prediction", "timestep_type": "continuous"}),
    ("EulerDiscreteScheduler", {"prediction_type": "sample", "interpolation_type": "log_linear"}),
    ("EulerAncestralDiscreteScheduler", {}),
    ("EulerAncestralDiscreteScheduler", {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}),
    ("DPMSolverMultistepScheduler", {}),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True, "euler_at_final": True}),
    ("DPMSolverMultistepScheduler", {"solver_order": 3, "prediction_type": "v_prediction"}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "timestep_spacing": "leading"}),
    ("DPMSolverMultistepScheduler", {"thresholding": True, "solver_type": "heun"}),
    ("UniPCMultistepScheduler", {}),
    ("UniPCMultistepScheduler", {"use_karras_sigmas": True, "disable_corrector": [0, 1]}),
    ("UniPCMultistepScheduler", {"solver_order": 3, "prediction_type": "v_prediction"}),
    ("LCMScheduler", {}),
    ("LCMScheduler", {"prediction_type": "v_prediction", "clip_sample": True}),
    ("LCMScheduler", {"thresholding": True}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
]


def equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    assert len(ours) == len(theirs)
    return all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("steps", [4, 10, 25])
@pytest.mark.parametrize(("name", "config"), CONFIGS, ids=str)
def test_the_hosts_own_methods_to_the_bit(name, config, steps):
    theirs, ours = make(name, **config), put_on(make(name, **config))
    for seed, count in ((0, steps), (1, 5)):
        torch.manual_seed(seed)
        expected = run(theirs, start(batch=2, seed=seed), count)
        torch.manual_seed(seed)
        assert equal(run(ours, start(batch=2, seed=seed), count), expected)
    hosts, own = vars(theirs), vars(ours)
    assert hosts.keys() == own.keys() - set(LOOPS[name].methods)
    for attribute, value in hosts.items():
        mine = own[attribute]
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, mine), attribute
        elif isinstance(value, (int, float, str, bool, type(None))):
            assert value == mine, attribute
        elif isinstance(value, numpy.ndarray):
            assert (value == mine).all(), attribute


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_to_the_bit(name, dtype):
    theirs, ours = make(name), put_on(make(name))
    torch.manual_seed(0)
    expected = run(theirs, start(dtype=dtype), 10)
    torch.manual_seed(0)
    assert equal(run(ours, start(dtype=dtype), 10), expected)


@pytest.mark.parametrize("name", LOOPS)
def test_image_to_image_begins_later(name):
    torch.manual_seed(0)
    expected = run(make(name), start(), 10, begin=4)
    torch.manual_seed(0)
    assert equal(run(put_on(make(name)), start(), 10, begin=4), expected)


@pytest.mark.parametrize("name", LOOPS)
def test_a_timestep_that_is_no_view_is_the_hosts_own_affair(name):
    def by_value(scheduler):
        scheduler.set_timesteps(5)
        sample = start()
        for t in scheduler.timesteps.clone():
            scaled = scheduler.scale_model_input(sample, t) if hasattr(scheduler, "scale_model_input") else sample
            sample = scheduler.step(scaled * 0.1, t, sample).prev_sample
        return sample

    torch.manual_seed(0)
    expected = by_value(make(name))
    torch.manual_seed(0)
    assert torch.equal(by_value(put_on(make(name))), expected)


GENERATORS = {
    "one": lambda: torch.Generator().manual_seed(7),
    "list": lambda: [torch.Generator().manual_seed(seed) for seed in (7, 8)],
    "list of one": lambda: [torch.Generator().manual_seed(7)],
    "none": lambda: None,
}

OURS = [
    ("EulerAncestralDiscreteScheduler", {}),
    ("EulerAncestralDiscreteScheduler", {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}),
    ("EulerAncestralDiscreteScheduler", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}),
    ("LCMScheduler", {}),
    ("LCMScheduler", {"prediction_type": "v_prediction", "set_alpha_to_one": False}),
    ("LCMScheduler", {"prediction_type": "sample", "clip_sample": True}),
    ("LCMScheduler", {"thresholding": True}),
]


@pytest.mark.parametrize("generator", GENERATORS)
@pytest.mark.parametrize("steps", [4, 10, 25])
@pytest.mark.parametrize(("name", "config"), OURS, ids=str)
def test_our_noisy_steps_one_by_one(name, config, steps, generator, monkeypatch):
    theirs = make(name, **config)
    pretend_elsewhere(monkeypatch)
    torch.manual_seed(3)
    ours, given = put_on(make(name, **config)), GENERATORS[generator]()
    assert max(lockstep(theirs, ours, start(2), steps, generator=given)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "config"), OURS, ids=str)
def test_our_noisy_steps_in_half_precision(name, config, dtype, monkeypatch):
    theirs, generator = make(name, **config), torch.Generator().manual_seed(7)
    pretend_elsewhere(monkeypatch)
    apart = lockstep(theirs, put_on(make(name, **config)), start(2, dtype), 10, generator=generator)
    assert max(apart) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("generator", GENERATORS)
@pytest.mark.parametrize(("name", "config"), OURS, ids=str)
def test_our_noisy_trajectories_and_what_they_leave_of_the_generator(name, config, generator, monkeypatch):
    """Two calls in a row with other numbers of steps draw what the host draws, in the same order."""

    def go(scheduler):
        torch.manual_seed(3)
        given = GENERATORS[generator]()
        found = [*run(scheduler, start(2), 10, generator=given), *run(scheduler, start(2), 6, generator=given)]
        return found, [each.get_state() for each in (given if isinstance(given, list) else [given]) if each]

    theirs, states = go(make(name, **config))
    pretend_elsewhere(monkeypatch)
    ours, own_states = go(put_on(make(name, **config)))
    for one, other in zip(ours, theirs, strict=True):
        assert relative(one, other) < 2e-5
    assert all(torch.equal(one, other) for one, other in zip(own_states, states, strict=True))


@pytest.mark.parametrize("generator", GENERATORS)
@pytest.mark.parametrize(
    ("name", "config", "arguments"),
    [
        ("DDIMScheduler", {}, {"eta": 1.0}),
        ("DDIMScheduler", {}, {"eta": 0.0}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, {}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}, {}),
    ],
    ids=str,
)
def test_noise_handed_to_the_host_is_the_hosts_to_the_bit(name, config, arguments, generator, monkeypatch):
    torch.manual_seed(3)
    expected = run(make(name, **config), start(2), 10, generator=GENERATORS[generator](), **arguments)
    pretend_elsewhere(monkeypatch)
    torch.manual_seed(3)
    ours = run(put_on(make(name, **config)), start(2), 10, generator=GENERATORS[generator](), **arguments)
    assert equal(ours, expected)


def test_noise_that_was_given_stays():
    noise = start(seed=9)
    results = []
    for scheduler in (make("DDIMScheduler"), put_on(make("DDIMScheduler"))):
        results.append(run(scheduler, start(), 4, eta=0.5, variance_noise=noise)[-1])
    assert torch.equal(*results)
    with pytest.raises(ValueError, match="generator and variance_noise"):
        run(put_on(make("DDIMScheduler")), start(), 4, eta=0.5, variance_noise=noise, generator=torch.Generator())


UNIPC = [
    {},
    {"solver_order": 1},
    {"solver_order": 3},
    {"solver_order": 3, "lower_order_final": False, "final_sigmas_type": "sigma_min"},
    {"solver_type": "bh1", "final_sigmas_type": "sigma_min"},
    {"solver_type": "bh1", "solver_order": 3, "final_sigmas_type": "sigma_min"},
    {"predict_x0": False, "final_sigmas_type": "sigma_min"},
    {"predict_x0": False, "solver_order": 3, "solver_type": "bh1", "final_sigmas_type": "sigma_min"},
    {"use_karras_sigmas": True, "prediction_type": "v_prediction"},
    {"disable_corrector": [0, 2], "timestep_spacing": "trailing"},
    {"prediction_type": "sample", "thresholding": True},
    {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0},
]


def host_in_double(config, steps, batch=1):
    """The host's own trajectory in double precision: what both are roundings of."""
    scheduler = make("UniPCMultistepScheduler", **config)
    scheduler.set_timesteps(steps)
    scheduler.sigmas = scheduler.sigmas.double()
    sample, found = start(batch, torch.float64), []
    for t in scheduler.timesteps:
        sample = scheduler.step(model(sample, t), t, sample, return_dict=False)[0]
        found.append(sample)
    return found


@pytest.mark.parametrize("steps", [4, 10, 25])
@pytest.mark.parametrize("config", UNIPC, ids=str)
def test_unipc_solved_on_the_host(config, steps, monkeypatch):
    theirs = run(make("UniPCMultistepScheduler", **config), start(2), steps)
    exact = host_in_double(config, steps, 2)
    pretend_elsewhere(monkeypatch)
    scheduler = put_on(make("UniPCMultistepScheduler", **config))
    ours = run(scheduler, start(2), steps)
    assert torch.isfinite(theirs[-1]).all()
    for one, other, reference in zip(ours, theirs, exact, strict=True):
        assert relative(one, reference) < 2e-6 + relative(other, reference)
        assert relative(one, other) < 1e-4
    assert equal(run(scheduler, start(2), steps), ours)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_unipc_in_half_precision_is_as_near_as_the_hosts(dtype, monkeypatch):
    theirs, exact = run(make("UniPCMultistepScheduler"), start(dtype=dtype), 10), host_in_double({}, 10)
    pretend_elsewhere(monkeypatch)
    ours = run(put_on(make("UniPCMultistepScheduler")), start(dtype=dtype), 10)
    assert ours[-1].dtype == dtype
    assert relative(ours[-1], exact[-1]) < 1.2 * relative(theirs[-1], exact[-1])


def test_what_unipc_cannot_solve_is_the_hosts_own_affair(monkeypatch):
    """bh1 with no noise left at the end is NaN in the host; ours is not asked, and does not fail."""
    config = {"predict_x0": False}
    theirs = run(make("UniPCMultistepScheduler", **config), start(), 5)
    pretend_elsewhere(monkeypatch)
    ours = run(put_on(make("UniPCMultistepScheduler", **config)), start(), 5)
    assert torch.equal(torch.isnan(ours[-1]), torch.isnan(theirs[-1]))
    inner = make("DPMSolverMultistepScheduler")
    results = [
        run(wrap(make("UniPCMultistepScheduler", solver_p=inner)), start(), 6)[-1] for wrap in (put_on, lambda x: x)
    ]
    assert relative(*results) < 1e-5


@pytest.mark.parametrize("name", LOOPS)
def test_impossible_calls_are_refused_as_the_host_refuses_them(name):
    scheduler = put_on(make(name))
    scheduler.set_timesteps(4)
    sample, t = start(), scheduler.timesteps[0]
    for args, kwargs in (
        ((sample, t, sample), {"sample": sample}),
        ((sample, t, sample), {"mood": 1}),
        ((sample,), {}),
    ):
        with pytest.raises(TypeError):
            scheduler.step(*args, **kwargs)
