"""The loop without waiting on whole pipelines: the same pictures, off without a trace, clear about its limits."""

from __future__ import annotations

import copy
import inspect
import pickle

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)

from diffusers_turbo import TurboError, turbo
from diffusers_turbo.errors import NotSupportedError
from diffusers_turbo.planning.options import SYNC_FREE_SCHEDULERS
from diffusers_turbo.schedulers.loop import LoopMethod
from diffusers_turbo.schedulers.registry import LOOPS
from tests import tiny
from tests.schedulers.trajectories import STABLE_DIFFUSION, pretend_elsewhere
from tests.schedulers.unreadable import DEVICE, READS, Waits, make_readable_as_gpu, with_timesteps_sent
from tests.state import differences, state_of

NAMES = [name for name in LOOPS if not name.startswith("FlowMatch")]


def with_scheduler(make, name):
    pipe = make()
    cls = getattr(diffusers, name)
    pipe.scheduler = cls.from_config(pipe.scheduler.config, **STABLE_DIFFUSION.get(name, {}))
    return turbo(pipe)


def noisy(pipe, seed=5, **arguments):
    torch.manual_seed(1)
    return tiny.picture(pipe, steps=3, batch=2, generator=torch.Generator().manual_seed(seed), **arguments)


@pytest.mark.parametrize("make", [tiny.sd, tiny.sdxl], ids=["sd", "sdxl"])
@pytest.mark.parametrize("name", NAMES)
def test_pictures_and_undo(make, name, monkeypatch):
    pipe = with_scheduler(make, name)
    config = dict(pipe.scheduler.config)
    stock = noisy(pipe)
    before = state_of(pipe)
    pipe.enable_sync_free_loop()
    assert torch.equal(noisy(pipe), stock)
    assert dict(pipe.scheduler.config) == config
    with monkeypatch.context() as patch:
        pretend_elsewhere(patch)
        torch.testing.assert_close(noisy(pipe), stock, atol=2e-5, rtol=0)
    assert pipe.turbo_undo().left_alone == ()
    assert differences(before, state_of(pipe)) == []
    assert torch.equal(noisy(pipe), stock)


def test_planner_and_registry_know_the_same_schedulers():
    assert tuple(LOOPS) == SYNC_FREE_SCHEDULERS


@pytest.mark.parametrize("name", NAMES)
def test_methods_keep_name_signature_and_docstring(name):
    pipe = with_scheduler(tiny.sd, name)
    stock = {method: getattr(pipe.scheduler, method) for method in LOOPS[name].methods}
    pipe.enable_sync_free_loop()
    for method, host in stock.items():
        ours = getattr(pipe.scheduler, method)
        assert isinstance(ours, LoopMethod)
        assert (ours.__name__, ours.__doc__) == (host.__name__, host.__doc__)
        assert inspect.signature(ours) == inspect.signature(host)


def through_pickle(pipe):
    return pickle.loads(pickle.dumps(pipe))


@pytest.mark.parametrize(
    ("name", "carry"),
    [*((name, copy.deepcopy) for name in NAMES), *((name, through_pickle) for name in NAMES[:1] + NAMES[-2:])],
)
def test_copies_step_their_own_scheduler(name, carry):
    pipe = with_scheduler(tiny.sd, name)
    pipe.enable_sync_free_loop()
    under_switch = noisy(pipe)
    twin = carry(pipe)
    assert twin.scheduler.step.loop.scheduler is twin.scheduler
    assert twin.scheduler.step.loop is not pipe.scheduler.step.loop
    assert torch.equal(noisy(twin), under_switch)
    assert twin.turbo_undo().left_alone == ()
    assert not any(isinstance(value, LoopMethod) for value in vars(twin.scheduler).values())
    assert isinstance(pipe.scheduler.step, LoopMethod)
    assert torch.equal(noisy(twin), under_switch)
    assert torch.equal(noisy(pipe), under_switch)


def test_a_copy_in_the_middle_of_a_loop_goes_on():
    scheduler = with_scheduler(tiny.sd, "UniPCMultistepScheduler")
    scheduler.enable_sync_free_loop()
    one = scheduler.scheduler
    one.set_timesteps(6)
    sample, output = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    for t in one.timesteps[:3]:
        sample = one.step(output, t, sample).prev_sample
    other = copy.deepcopy(one)
    left = sample
    for t, same in zip(one.timesteps[3:], other.timesteps[3:], strict=True):
        sample = one.step(output, t, sample).prev_sample
        left = other.step(output, same, left).prev_sample
    assert torch.equal(sample, left)


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "LCMScheduler"])
def test_image_to_image_through_from_pipe(name):
    pipe = with_scheduler(tiny.sd, name)
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))

    def picture():
        torch.manual_seed(0)
        other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
        other.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        arguments = {"strength": 0.6, "num_inference_steps": 5, "generator": generator, "output_type": "pt"}
        return other("red cat", image=image, **arguments).images

    stock = picture()
    pipe.enable_sync_free_loop()
    assert torch.equal(picture(), stock)
    pipe.turbo_undo()
    assert torch.equal(picture(), stock)


def test_saved_as_if_it_were_off(tmp_path):
    pipe = with_scheduler(tiny.sd, "DDIMScheduler")
    pipe.save_pretrained(tmp_path / "off")
    pipe.enable_sync_free_loop()
    pipe.save_pretrained(tmp_path / "on")
    for file in ("model_index.json", "scheduler/scheduler_config.json"):
        assert (tmp_path / "on" / file).read_text() == (tmp_path / "off" / file).read_text()
    fresh = DDIMScheduler.from_config(pipe.scheduler.config)
    assert not any(isinstance(value, LoopMethod) for value in vars(fresh).values())


def test_a_scheduler_put_in_meanwhile_is_left_alone(caplog):
    pipe = with_scheduler(tiny.sd, "DDIMScheduler")
    old, names = pipe.scheduler, set(vars(pipe.scheduler))
    pipe.enable_sync_free_loop()
    pipe.scheduler = new = diffusers.EulerDiscreteScheduler.from_config(old.config)
    own = set(vars(new))
    expected = tiny.picture(with_scheduler(tiny.sd, "EulerDiscreteScheduler"))
    for _ in range(2):
        assert torch.equal(tiny.picture(pipe), expected)
    assert caplog.text.count("DDIMScheduler was replaced by another EulerDiscreteScheduler meanwhile") == 1
    assert "switch it on again" in caplog.text
    report = pipe.turbo_undo()
    assert pipe.scheduler is new
    assert (set(vars(old)), set(vars(new))) == (names, own)
    (sentence,) = report.left_alone
    assert sentence == "the pipeline's DDIMScheduler was replaced by another EulerDiscreteScheduler meanwhile"


def test_a_step_hooked_meanwhile_stays():
    pipe = with_scheduler(tiny.sd, "DDIMScheduler")
    pipe.enable_sync_free_loop()
    pipe.scheduler.step = mine = lambda *args, **kwargs: None
    report = pipe.turbo_undo()
    assert pipe.scheduler.step is mine
    assert "set_timesteps" not in vars(pipe.scheduler)
    assert any("DDIMScheduler.step was set to" in sentence for sentence in report.left_alone)


class MyDDIM(DDIMScheduler):
    """Somebody's own scheduler."""


@pytest.mark.parametrize(
    ("replace", "found"),
    [
        (lambda old: diffusers.HeunDiscreteScheduler.from_config(old.config), "a HeunDiscreteScheduler, whose steps"),
        (lambda old: MyDDIM.from_config(old.config), "a MyDDIM, whose steps this package does not know"),
    ],
)
def test_other_schedulers_are_refused(replace, found):
    pipe = with_scheduler(tiny.sd, "DDIMScheduler")
    pipe.scheduler = replace(pipe.scheduler)
    before = state_of(pipe)
    with pytest.raises(NotSupportedError, match=rf"enable_sync_free_loop\(\): found {found}.*needed: one of DDIMSched"):
        pipe.enable_sync_free_loop()
    assert differences(before, state_of(pipe)) == []


def test_a_hooked_or_shared_scheduler_is_refused():
    pipe = with_scheduler(tiny.sd, "DDIMScheduler")
    pipe.enable_sync_free_loop()
    other = turbo(StableDiffusionPipeline(**pipe.components, requires_safety_checker=False))
    with pytest.raises(TurboError, match=r"whose set_timesteps was replaced already \(by this"):
        other.enable_sync_free_loop()
    pipe.turbo_undo()
    other.enable_sync_free_loop()


# newer SDXL pipelines tell their scheduler where the loop begins, and then these two have nothing left to wait for
TOLD = "set_begin_index" in inspect.getsource(StableDiffusionXLPipeline)
WHOLE = [(tiny.sd, name, True) for name in NAMES]
WHOLE += [(tiny.sdxl, name, True) for name in ("UniPCMultistepScheduler",)]
WHOLE += [(tiny.sdxl, name, not TOLD) for name in ("DPMSolverMultistepScheduler", "EulerDiscreteScheduler")]


@pytest.mark.parametrize(("make", "name", "stock_waits"), WHOLE, ids=lambda value: getattr(value, "__name__", None))
def test_the_whole_pipeline_never_waits_in_its_loop(make, name, stock_waits, monkeypatch):
    """Every component on a device whose values cannot be read: the stock loop fails or waits, ours runs through."""

    def go(pipe, waits):
        make_readable_as_gpu(waits, monkeypatch)
        pipe.to(DEVICE)
        width = pipe.unet.config.cross_attention_dim
        text = {"prompt_embeds": torch.empty(1, tiny.TOKENS, width, device=DEVICE)}
        text["negative_prompt_embeds"] = text["prompt_embeds"]
        if make is tiny.sdxl:
            text["pooled_prompt_embeds"] = torch.empty(1, tiny.CONTEXT, device=DEVICE)
            text["negative_pooled_prompt_embeds"] = text["pooled_prompt_embeds"]
        denoise = pipe.unet.forward
        steps = []

        def first_step_on(*args, **kwargs):
            if not steps:
                waits.__enter__()
            steps.append(args[1])
            return denoise(*args, **kwargs)

        pipe.unet.forward = first_step_on
        try:
            generator = torch.Generator().manual_seed(0)
            latents = torch.empty(1, 4, 8, 8, device=DEVICE)
            pipe(**text, latents=latents, num_inference_steps=3, output_type="latent", generator=generator)
        except READS as error:
            waits.found.append(str(error))
        finally:
            if steps:
                waits.__exit__(None, None, None)
        return steps

    stock, ours = Waits(), Waits()
    pipe = with_scheduler(make, name)
    with_timesteps_sent(pipe.scheduler)
    go(pipe, stock)
    assert bool(stock.found) == stock_waits
    pipe = with_scheduler(make, name)
    pipe.enable_sync_free_loop()
    steps = go(pipe, ours)
    assert ours.found == []
    assert len(steps) == len(pipe.scheduler.timesteps)
    assert {t.device for t in steps} == {DEVICE}
