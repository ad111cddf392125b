"""Graphs of a denoiser that is there whole while it works and leaves in between: partial offload of everything."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig

from diffusers_turbo import turbo
from diffusers_turbo.actions.ahead import AheadCall, graphs_of
from diffusers_turbo.actions.calls import COMPILED, calls_from
from diffusers_turbo.actions.partial_offload import PartialResidency
from diffusers_turbo.errors import NotSupportedError
from diffusers_turbo.graphs.capture import CAPTURES
from tests import tiny
from tests.actions.starved import Starved, actions, on
from tests.controlled import controlled
from tests.graphs.fake import FakeCapture
from tests.graphs.offloaded import DEVICE, recorded
from tests.state import differences, state_of

pytestmark = pytest.mark.usefixtures("what_left_is_not_a_number")

AHEAD = ("enable_time_projections", "enable_prompt_projections", "enable_shared_guidance")


def ahead_of(pipe):
    """The calls that compute ahead, over the denoiser's."""
    return [call for call in calls_from(vars(pipe.unet)[COMPILED]) if isinstance(call, AheadCall)]


def offloaded(pipe=None, *, leaves=True, actions=()):
    pipe = pipe or turbo(tiny.sd())
    pipe.enable_partial_offload(None, denoiser_leaves=leaves, device=DEVICE)
    pipe.enable_cuda_graphs()
    for action in actions:
        getattr(pipe, action)()
    return pipe


@pytest.mark.parametrize("leaves", [False, True])
@pytest.mark.parametrize("actions", [(), AHEAD], ids=["graphs", "and what is ahead"])
def test_each_call_replays_and_gives_the_eager_picture(leaves, actions):
    stock = tiny.picture(tiny.sd(), steps=4)
    pipe = offloaded(leaves=leaves, actions=actions)
    assert torch.allclose(tiny.picture(pipe, steps=4), stock, atol=1e-5)
    graphs = recorded(pipe)
    assert (graphs.eager, graphs.captured, graphs.replayed) == (1, 1, 3)
    for _ in range(2):
        assert torch.allclose(tiny.picture(pipe, steps=4), stock, atol=1e-5)
    # weights that came back lie elsewhere, which asks for a new graph and for no eager step
    assert (graphs.eager, graphs.captured, graphs.replayed) == (1, 3 if leaves else 1, 11)
    assert graphs.reason is None
    assert [(call.reason, call.made > 0) for call in ahead_of(pipe)] == [(None, True)] * (2 if actions else 0)


def test_what_is_ahead_is_switched_without_moving_weights(monkeypatch):
    pipe = offloaded()
    started = []
    monkeypatch.setattr(PartialResidency, "start", lambda self: started.append(self))
    for action in AHEAD:
        getattr(pipe, action)()
    tiny.picture(pipe, steps=4)
    pipe.disable_prompt_projections()
    assert started == []


@pytest.mark.parametrize("first", ["offload", "ahead"])
def test_what_is_ahead_outlives_the_offload_and_the_other_way_round(first):
    pipe = turbo(tiny.sd())
    stock, before = tiny.picture(pipe, steps=4), state_of(pipe)
    offloaded(pipe, actions=AHEAD)
    tiny.picture(pipe, steps=4)
    if first == "offload":
        pipe.disable_offload()
        tiny.picture(pipe, steps=4)
        assert [call.reason for call in ahead_of(pipe)] == [None, None]
        assert vars(pipe.unet.down_blocks[0].resnets[0])["forward"]  # of both halves of guidance
    else:
        for action in AHEAD:
            getattr(pipe, action.replace("enable", "disable"))()
    assert torch.allclose(tiny.picture(pipe, steps=4), stock, atol=1e-5)
    pipe.turbo_undo()
    assert differences(before, state_of(pipe)) == []


def test_a_denoiser_that_leaves_takes_its_graphs_along():
    pipe = offloaded(actions=AHEAD)
    tiny.picture(pipe, steps=4)
    alive = []
    decode = pipe.vae.decode

    def look(*args, **kwargs):
        result = decode(*args, **kwargs)
        alive.append(FakeCapture.alive)
        return result

    pipe.vae.decode = look
    tiny.picture(pipe, steps=4)
    assert alive == [0]
    assert FakeCapture.alive == 0


@pytest.mark.parametrize("first", ["graphs", "offload"])
def test_whoever_comes_first_nothing_is_left_behind(first):
    pipe = turbo(tiny.sd())
    stock, before = tiny.picture(pipe, steps=4), state_of(pipe)
    steps = [pipe.enable_cuda_graphs, lambda: pipe.enable_partial_offload(None, denoiser_leaves=True, device=DEVICE)]
    for step in steps if first == "graphs" else reversed(steps):
        step()
    for _ in range(2):
        assert torch.equal(tiny.picture(pipe, steps=4), stock)
    assert recorded(pipe).replayed >= 6
    pipe.disable_offload()
    assert torch.equal(tiny.picture(pipe, steps=4), stock)
    pipe.turbo_undo()
    assert differences(before, state_of(pipe)) == []
    assert FakeCapture.alive == 0


def test_what_comes_for_one_call_is_not_recorded_for_it():
    """On the CPU, or where graphs were there first, they stand over text encoder and VAE, too."""
    pipe = offloaded()
    for _ in range(4):
        tiny.picture(pipe, steps=4)
    assert [vars(part)[COMPILED].captured for part in (pipe.text_encoder, pipe.vae.decoder)] == [0, 0]


def test_weights_and_adapters_that_change_between_calls_and_steps():
    pipe, plain = offloaded(), tiny.sd()

    def change(pipe, step, timestep, tensors):
        with torch.no_grad():
            pipe.unet.conv_in.weight.mul_(1 + step / 10)
        return {}

    for _ in range(2):
        ours, stock = (tiny.picture(each, steps=4, callback_on_step_end=change) for each in (pipe, plain))
        assert torch.equal(ours, stock)
    for each in (pipe, plain):
        torch.manual_seed(1)
        each.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    for _ in range(2):
        assert torch.equal(tiny.picture(pipe, steps=4), tiny.picture(plain, steps=4))
    for each in (pipe, plain):
        each.unet.delete_adapters("default")
    assert torch.equal(tiny.picture(pipe, steps=4), tiny.picture(plain, steps=4))


@pytest.mark.parametrize("work", ["encode", "decode"])
@pytest.mark.parametrize("first", ["graphs", "offload"])
def test_a_callback_that_has_other_components_work_between_the_steps(first, work):
    """The denoiser leaves and comes back in one call of the pipeline, and so does the VAE."""
    made: dict[str, list] = {"ours": [], "stock": []}

    def between(name):
        def callback(pipe, step, timestep, tensors):
            if work == "encode":
                made[name].append(pipe.encode_prompt("another", "cpu", 1, True)[0])
            else:
                made[name].append(pipe.vae.decode(tensors["latents"].clone()).sample)
            return {}

        return callback

    pipe, plain = turbo(tiny.sd()), tiny.sd()
    if first == "graphs":
        pipe.enable_cuda_graphs()
    offloaded(pipe)
    for _ in range(2):
        ours = tiny.picture(pipe, steps=6, callback_on_step_end=between("ours"))
        stock = tiny.picture(plain, steps=6, callback_on_step_end=between("stock"))
        assert torch.allclose(ours, stock, atol=1e-5)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(made["ours"], made["stock"], strict=True))
    assert FakeCapture.alive == 0


@pytest.mark.parametrize("resident_bytes", [None, 100_000])
@pytest.mark.parametrize("first", ["graphs", "offload"])
def test_graphs_of_several_controlnets_leave_with_them(first, resident_bytes):
    """Where they are streamed there are none: a graph of one would begin in the middle of what all of them stream."""
    pipe = turbo(controlled(several=True))

    def encode(pipe, step, timestep, tensors):
        pipe.encode_prompt("another", "cpu", 1, True)
        return {}

    arguments = {"image": [torch.ones(1, 3, 64, 64)] * 2, "controlnet_conditioning_scale": [1.0, 0.5]}
    arguments |= {"height": 64, "width": 64, "steps": 4}
    stock = tiny.picture(pipe, **arguments)
    if first == "graphs":
        pipe.enable_cuda_graphs()
    pipe.enable_partial_offload(resident_bytes, denoiser_leaves=True, device=DEVICE)
    if first == "offload":
        pipe.enable_cuda_graphs()
    for callback in (None, encode, None):
        ours = tiny.picture(pipe, **arguments, callback_on_step_end=callback)
        assert torch.allclose(ours, stock, atol=1e-5)
    captured = {graphs_of(vars(net)[COMPILED]).captured > 0 for net in pipe.controlnet.nets}
    assert captured == {resident_bytes is None}
    assert FakeCapture.alive == 0


@pytest.mark.parametrize("then", ["enable_model_cpu_offload", "enable_group_offload", "disable_offload"])
def test_an_offload_that_is_switched_between_two_steps_ends_the_graphs_of_before(then):
    pipe = offloaded()
    replays = []

    def switch(pipe, step, timestep, tensors):
        if step == 2:
            options = {"enable_model_cpu_offload": {"device": "cpu"}, "enable_group_offload": {"onload_device": "cpu"}}
            getattr(pipe, then)(**options.get(then, {}))
            replays.append(recorded(pipe).replayed)
        return {}

    stock = tiny.picture(tiny.sd(), steps=6)
    assert torch.allclose(tiny.picture(pipe, steps=6, callback_on_step_end=switch), stock, atol=1e-5)
    graphs = recorded(pipe)
    if then == "disable_offload":
        assert graphs.captured == 2  # anew, where the weights are now
    else:
        assert graphs.replayed == replays[0]
        assert "carries offload hooks" in graphs.reason


def test_a_recording_that_failed_is_tried_again_where_weights_have_moved(monkeypatch):
    failing = [True, False, False]

    def flaky(run, device):
        if failing.pop(0):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return FakeCapture(run, device)

    monkeypatch.setitem(CAPTURES, "cpu", flaky)
    pipe = offloaded()
    for _ in range(3):
        tiny.picture(pipe, steps=4)
    assert recorded(pipe).captured == 2


@pytest.mark.parametrize("resident_bytes", [100_000, None])
@pytest.mark.parametrize("first", ["ahead", "offload"])
def test_a_forward_that_was_taken_back_under_a_hook_does_not_come_back_with_it(first, resident_bytes):
    pipe = turbo(tiny.sd())
    tiny.picture(pipe)
    before = state_of(pipe)
    steps = [pipe.enable_prompt_projections, lambda: pipe.enable_partial_offload(resident_bytes, device=DEVICE)]
    for step in steps if first == "ahead" else reversed(steps):
        step()
    for _ in range(2):
        tiny.picture(pipe)
    assert pipe.turbo_undo().left_alone == ()
    assert differences(before, state_of(pipe)) == []


@pytest.mark.parametrize("resident_bytes", [None, 100_000])
def test_a_denoiser_with_hooks_of_others_is_refused_under_an_offload_too(resident_bytes):
    pipe = turbo(tiny.sd())
    pipe.unet.mid_block.register_forward_hook(lambda *_: None)
    pipe.enable_partial_offload(resident_bytes, device=DEVICE)
    with pytest.raises(NotSupportedError, match="carries forward hooks"):
        pipe.enable_cuda_graphs()


def test_the_denoiser_called_by_itself_comes_too():
    pipe = offloaded()
    arguments = (torch.ones(1, 4, 8, 8), 3, torch.ones(1, tiny.TOKENS, tiny.CONTEXT))
    with torch.no_grad():
        stock = tiny.sd().unet(*arguments).sample
        for _ in range(4):
            assert torch.equal(pipe.unet(*arguments).sample, stock)


def test_when_memory_runs_out_graphs_go_first_and_then_the_denoiser_is_streamed(monkeypatch):
    stock = tiny.picture(tiny.sd(), steps=4)
    pipe = turbo(tiny.sd())
    starved = Starved(on(pipe, "enable_group_offload")).install(monkeypatch, pipe.unet)
    offloaded(pipe, actions=AHEAD).enable_memory_fallback()
    assert torch.allclose(tiny.picture(pipe, steps=4), stock, atol=1e-5)
    assert starved.failures > 0
    assert FakeCapture.alive == 0
    assert "enable_cuda_graphs" not in actions(pipe)
    assert "enable_group_offload" in actions(pipe)
    assert torch.allclose(tiny.picture(pipe, steps=4), stock, atol=1e-5)
    pipe.turbo_undo()
    assert not vars(pipe.unet).get(COMPILED)
