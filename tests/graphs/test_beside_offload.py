"""Graphs of a denoiser that is there whole while it works and leaves in between: partial offload of everything."""

from __future__ import annotations

import copy
from contextlib import ExitStack

import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel
from peft import LoraConfig

from diffusers_turbo import turbo
from diffusers_turbo.actions import partial_offload, streaming
from diffusers_turbo.actions.ahead import AheadCall, graphs_of
from diffusers_turbo.actions.calls import COMPILED, calls_from
from diffusers_turbo.actions.ledger import ledger_of
from diffusers_turbo.actions.partial_offload import PartialResidency
from diffusers_turbo.actions.streaming import Loan, Window
from diffusers_turbo.errors import NotSupportedError
from diffusers_turbo.graphs.capture import CAPTURES
from tests import tiny
from tests.actions.starved import Starved, actions, on
from tests.graphs.fake import FakeCapture
from tests.state import differences, state_of

DEVICE = "cpu:0"
"""Is not "cpu": weights on it are copies, as on a GPU."""

AHEAD = ("enable_time_projections", "enable_prompt_projections", "enable_shared_guidance")


@pytest.fixture(autouse=True)
def what_left_is_not_a_number(monkeypatch):
    """Weights that went home leave NaN where they were: a graph that still reads there shows it."""
    end = Loan.end

    def spoilt(self):
        copies = [(tensor, tensor.data) for tensor in self._away]
        end(self)
        for tensor, held in copies:
            if held.data_ptr() != tensor.data_ptr() and held.is_floating_point():
                held.fill_(torch.nan)

    monkeypatch.setattr(Loan, "end", spoilt)


def recorded(pipe):
    return graphs_of(vars(pipe.unet)[COMPILED])


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
    torch.manual_seed(1)
    base = tiny.sd()
    net = ControlNetModel.from_unet(base.unet, conditioning_embedding_out_channels=(8, 8, 16, 16)).eval()
    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    parts = {name: part for name, part in base.components.items() if name != "safety_checker"}
    parts |= {"controlnet": MultiControlNetModel([net, copy.deepcopy(net)]), "safety_checker": None}
    pipe = turbo(StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False))
    pipe.set_progress_bar_config(disable=True)

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


@pytest.fixture
def recording(monkeypatch):
    """Have the offload told when the stand-in records, as CUDA tells it."""
    state = []

    class Told(FakeCapture):
        def __init__(self, run, device):
            state.append(True)
            try:
                super().__init__(run, device)
            finally:
                state.pop()

    monkeypatch.setitem(CAPTURES, "cpu", Told)
    for user in (partial_offload, streaming):
        monkeypatch.setattr(user, "is_recording", lambda device: bool(state))
    return state


@pytest.mark.parametrize("resident_bytes", [0, 300_000, 700_000])
@pytest.mark.parametrize("leaves", [False, True])
def test_a_denoiser_that_is_streamed_is_recorded_with_its_copies(resident_bytes, leaves, recording):
    pipe, plain = turbo(tiny.sd()), tiny.sd()
    tiny.picture(pipe, steps=4)
    before, weights = state_of(pipe), copy.deepcopy(pipe.unet.state_dict())
    pipe.enable_partial_offload(resident_bytes, denoiser_leaves=leaves, device=DEVICE)
    pipe.enable_cuda_graphs()
    graphs = recorded(pipe)

    def change(pipe, step, timestep, tensors):
        with torch.no_grad():
            pipe.unet.mid_block.resnets[0].conv1.weight.mul_(1 + step / 10)
            pipe.unet.conv_in.weight.mul_(1 + step / 10)
        return {}

    for _ in range(4):
        assert torch.equal(tiny.picture(pipe, steps=6), tiny.picture(plain, steps=6))
    assert graphs.reason is None
    # the first step learns, the second sees, the third is recorded; other calls record at once
    assert (graphs.eager, graphs.captured, graphs.replayed) == (2, 4, 22)
    assert FakeCapture.alive == 0  # gone with the window
    ours, stock = (tiny.picture(each, steps=4, callback_on_step_end=change) for each in (pipe, plain))
    assert torch.equal(ours, stock)
    pipe.unet.load_state_dict(weights)
    pipe.turbo_undo()
    assert differences(before, state_of(pipe)) == []


def test_a_controlnet_that_joins_late_is_not_learnt_inside_a_recording(recording, monkeypatch):
    """Which begins anew to learn the order of the layers, in the middle of a call that has graphs already."""
    enter, astray = PartialResidency.enter, []

    def watched(self, unit):
        if recording and self.groups is None:
            astray.append(unit)
        enter(self, unit)

    monkeypatch.setattr(PartialResidency, "enter", watched)
    base = tiny.sd()
    torch.manual_seed(1)
    net = ControlNetModel.from_unet(base.unet, conditioning_embedding_out_channels=(8, 8, 16, 16)).eval()
    parts = {name: part for name, part in base.components.items() if name != "safety_checker"}
    parts |= {"controlnet": net, "safety_checker": None}
    pipe = turbo(StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False))
    latents = (torch.ones(1, 4, 8, 8), 3, torch.ones(1, tiny.TOKENS, tiny.CONTEXT))
    hint = {"controlnet_cond": torch.ones(1, 3, 64, 64), "return_dict": False}
    with torch.no_grad(), ExitStack() as stack:
        stock = pipe.unet(*latents).sample, pipe.controlnet(*latents, **hint)[1]
        pipe.enable_partial_offload(100_000, device=DEVICE)
        pipe.enable_cuda_graphs()
        for lever in ledger_of(pipe).in_force():
            for scope in lever.journal.scopes:
                stack.enter_context(scope.around_call(pipe))
        for step in range(8):
            if step >= 3:
                assert torch.equal(pipe.controlnet(*latents, **hint)[1], stock[1])
            assert torch.equal(pipe.unet(*latents).sample, stock[0])
    assert astray == []
    assert recorded(pipe).captured == 2  # by itself, and beside the ControlNet


@pytest.mark.parametrize("resident_bytes", [None, 100_000])
def test_a_denoiser_with_hooks_of_others_is_refused_under_an_offload_too(resident_bytes):
    pipe = turbo(tiny.sd())
    pipe.unet.mid_block.register_forward_hook(lambda *_: None)
    pipe.enable_partial_offload(resident_bytes, device=DEVICE)
    with pytest.raises(NotSupportedError, match="carries forward hooks"):
        pipe.enable_cuda_graphs()


def test_a_recording_that_fails_half_way_leaves_nothing_in_the_window(recording, monkeypatch):
    """As where a graph finds no memory of its own under a tight cap."""
    enter, entered = Window.enter, []

    def failing(self, group):
        if recording:
            entered.append(group)
            if len(entered) % 3 == 0:
                raise torch.OutOfMemoryError("CUDA out of memory")
        enter(self, group)

    settle, settled = Window.settle, []

    def seen(self):
        settled.append(bool(recording))
        settle(self)

    monkeypatch.setattr(Window, "enter", failing)
    monkeypatch.setattr(Window, "settle", seen)
    pipe = turbo(tiny.sd())
    pipe.enable_partial_offload(300_000, device=DEVICE)
    pipe.enable_cuda_graphs()
    for _ in range(2):
        assert torch.equal(tiny.picture(pipe, steps=4), tiny.picture(tiny.sd(), steps=4))
    assert (recorded(pipe).captured, recorded(pipe).eager) == (0, 8)
    assert settled.count(True) == 2  # before either recording ended: its streams have come together
    assert "could not be captured" in str(pipe.turbo_report())


def test_a_denoiser_that_is_streamed_from_ordinary_memory_is_refused(monkeypatch):
    monkeypatch.setattr(partial_offload, "can_pin", lambda device: True)
    pipe = turbo(tiny.sd())
    pipe.enable_partial_offload(100_000, pin_memory=False, device=DEVICE)
    with pytest.raises(NotSupportedError, match="carries offload hooks, which move weights in the middle of a call"):
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
