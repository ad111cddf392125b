"""Schedulers by short name: the right class, the model's own noise schedule, and none of the wrong kind."""

from __future__ import annotations

import pytest

from diffusers_turbo.bench.schedulers import SCHEDULERS, is_flow_matching, make_scheduler, set_scheduler
from diffusers_turbo.errors import InvalidOptionError, NotSupportedError
from tests import tiny
from tests.bench import shrunk

NOISE = [name for name in SCHEDULERS if name != "flow_euler"]


@pytest.mark.parametrize("name", NOISE)
def test_every_scheduler_makes_a_picture_with_the_models_noise_schedule(name, monkeypatch):
    pipe = shrunk.ready("sd15")
    monkeypatch.setattr(pipe, "scheduler", pipe.scheduler)  # put back afterwards
    set_scheduler(pipe, name)
    assert type(pipe.scheduler).__name__ == SCHEDULERS[name]
    assert (pipe.scheduler.config.beta_end, pipe.scheduler.config.beta_schedule) == (0.012, "scaled_linear")
    pictures = shrunk.picture(pipe, num_inference_steps=3)
    assert pictures.isfinite().all()


def test_what_the_names_promise_holds_whatever_stood_before():
    config = {"skip_prk_steps": False, "solver_order": 3, "algorithm_type": "sde-dpmsolver++"}
    assert make_scheduler("pndm", config).config.skip_prk_steps
    made = make_scheduler("dpmpp_2m", config).config
    assert (made.solver_order, made.algorithm_type) == (2, "dpmsolver++")


def test_a_prediction_type_goes_over():
    pipe = shrunk.build("sd21", device="meta", text_encoders=False)
    set_scheduler(pipe, "euler")
    assert pipe.scheduler.config.prediction_type == "v_prediction"


def test_sdxls_config_leaves_samples_unclipped_in_ddim():
    pipe = shrunk.build("sdxl", device="meta", text_encoders=False)
    set_scheduler(pipe, "ddim")
    assert not pipe.scheduler.config.clip_sample


def test_the_wrong_kind_is_refused_and_changes_nothing():
    flow, noise = shrunk.build("flux", device="meta", text_encoders=False), tiny.sd()
    before = flow.scheduler, noise.scheduler
    with pytest.raises(
        NotSupportedError, match="FlowMatchEulerDiscreteScheduler is for flow.*choose one of flow_euler"
    ):
        set_scheduler(flow, "ddim")
    with pytest.raises(NotSupportedError, match="DDIMScheduler is for noise.*choose one of ddim, pndm"):
        set_scheduler(noise, "flow_euler")
    assert (flow.scheduler, noise.scheduler) == before
    set_scheduler(flow, "flow_euler")
    assert flow.scheduler is not before[0]
    assert flow.scheduler.config.use_dynamic_shifting


def test_a_multistep_solver_may_be_for_flow_too():
    assert is_flow_matching(make_scheduler("dpmpp_2m", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}))
    assert not is_flow_matching(make_scheduler("dpmpp_2m", {}))


def test_unknown_names_and_missing_schedulers_are_refused():
    with pytest.raises(InvalidOptionError, match="scheduler = 'eular'.*did you mean 'euler'"):
        make_scheduler("eular", {})
    with pytest.raises(InvalidOptionError, match="choose one of these names"):
        make_scheduler("???", {})
    with pytest.raises(NotSupportedError, match="object without a scheduler"):
        set_scheduler(object(), "ddim")
