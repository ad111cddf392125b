"""Partial offload beside what else happens: weights change, adapters come, a forward fails, another offload comes."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from peft import LoraConfig
from torch import nn

from diffusers_turbo import turbo
from tests import tiny
from tests.actions.streamed import EVERYTHING, Device, residency_of
from tests.state import differences, state_of


@pytest.fixture
def device(monkeypatch):
    return Device(monkeypatch)


def test_weights_changed_in_place_while_it_is_on():
    """By way of the parameter, between calls and between steps: both where they stay and where they are streamed."""
    pipe, plain = turbo(tiny.sd()), tiny.sd()
    pipe.enable_partial_offload(700_000, device="cpu:0")
    tiny.picture(pipe)

    def change(pipe):
        with torch.no_grad():
            for parameter in pipe.unet.parameters():
                parameter.mul_(1.01)

    def in_the_middle(pipe, step, timestep, tensors):
        if step == 1:
            change(pipe)
        return {}

    for each in (pipe, plain):
        change(each)
    assert torch.equal(tiny.picture(pipe), tiny.picture(plain))
    ours, stock = (tiny.picture(each, steps=4, callback_on_step_end=in_the_middle) for each in (pipe, plain))
    assert torch.equal(ours, stock)
    pipe.disable_offload()
    assert torch.equal(tiny.picture(pipe), tiny.picture(plain))


@pytest.mark.parametrize("leaves", [False, True])
def test_weights_changed_while_they_are_on_the_device(leaves, device):
    """What is changed there goes home; what is not comes back to the memory it had, without a copy."""
    pipe, plain = turbo(tiny.sd()), tiny.sd()
    pipe.enable_partial_offload(EVERYTHING, denoiser_leaves=leaves, device="cpu:0")
    tiny.picture(pipe)
    tiny.picture(pipe)
    parts = [pipe.vae, pipe.text_encoder, *([pipe.unet] if leaves else [])]
    homes = {tensor: tensor.data_ptr() for part in parts for tensor in part.parameters()}

    def in_the_middle(pipe, step, timestep, tensors):
        with torch.no_grad():
            pipe.unet.conv_in.weight.mul_(1 + step / 10)
            pipe.vae.decoder.conv_in.bias.add_(0.1)
        return {}

    ours, stock = (tiny.picture(each, steps=3, callback_on_step_end=in_the_middle) for each in (pipe, plain))
    assert torch.equal(ours, stock)
    assert torch.equal(tiny.picture(pipe), tiny.picture(plain))
    assert {tensor: tensor.data_ptr() for tensor in homes} == homes
    pipe.disable_offload()
    assert torch.equal(pipe.unet.conv_in.weight, plain.unet.conv_in.weight)
    assert torch.equal(tiny.picture(pipe), tiny.picture(plain))


@pytest.mark.parametrize("resident_bytes", [0, 700_000, EVERYTHING])
def test_a_lora_that_comes_and_goes(resident_bytes, device):
    pipe, plain = turbo(tiny.sd()), tiny.sd()
    pipe.enable_partial_offload(resident_bytes, device="cpu:0")
    stock = tiny.picture(pipe)
    for each in (pipe, plain):
        torch.manual_seed(1)
        config = LoraConfig(r=2, target_modules=["to_q", "conv1"], init_lora_weights=False)
        each.unet.add_adapter(config)
    expected = tiny.picture(plain)
    assert not torch.equal(expected, stock)
    assert torch.equal(tiny.picture(pipe), expected)
    modules = {unit.module for unit in residency_of(pipe).layers.units}
    assert {part for name, part in pipe.unet.named_modules() if name.endswith("lora_A.default")} <= modules
    pipe.disable_offload()
    assert torch.equal(tiny.picture(pipe), expected)
    assert not any("_hf_hook" in vars(module) for module in pipe.unet.modules())
    pipe.enable_partial_offload(resident_bytes, device="cpu:0")
    pipe.unet.delete_adapters("default")
    assert torch.equal(tiny.picture(pipe), stock)


@pytest.mark.parametrize("steps_before", [0, 1])
def test_an_error_in_the_middle_of_a_forward(steps_before, device):
    pipe = turbo(tiny.sd())
    stock, before = tiny.picture(pipe, steps=3), state_of(pipe)
    pipe.enable_partial_offload(100_000, device="cpu:0")
    conv, calls = pipe.unet.mid_block.resnets[0].conv1, []
    works = conv._conv_forward

    def fail(*arguments):
        calls.append(arguments)
        if len(calls) == steps_before + 1:
            raise KeyboardInterrupt
        return works(*arguments)

    conv._conv_forward = fail
    with pytest.raises(KeyboardInterrupt):
        tiny.picture(pipe, steps=3)
    assert device.windows == []
    assert device.bytes_of(pipe.unet) <= 100_000 * steps_before
    assert torch.equal(tiny.picture(pipe, steps=3), stock)
    del conv._conv_forward
    pipe.disable_offload()
    assert differences(before, state_of(pipe)) == []


def test_the_denoiser_called_outside_of_the_pipeline():
    pipe = turbo(tiny.sd())
    arguments = (torch.ones(1, 4, 8, 8), 3, torch.ones(1, tiny.TOKENS, tiny.CONTEXT))
    with torch.no_grad():
        stock = pipe.unet(*arguments).sample
        pipe.enable_partial_offload(700_000, device="cpu:0")
        for _ in range(3):
            assert torch.equal(pipe.unet(*arguments).sample, stock)
    with torch.inference_mode():
        assert torch.equal(pipe.unet(*arguments).sample, stock)
    pipe.disable_offload()
    assert not any(parameter.is_inference() for parameter in pipe.unet.parameters())


def test_a_layer_that_works_twice_in_a_forward():
    pipe = turbo(tiny.sd())
    twice = nn.Sequential(nn.Linear(32, 32), nn.SiLU())
    twice.append(twice[0])
    pipe.unet.conv_act = nn.Sequential(_LastDimension(twice), nn.SiLU())
    stock = tiny.picture(pipe, steps=3)
    pipe.enable_partial_offload(0, device="cpu:0")
    assert torch.equal(tiny.picture(pipe, steps=3), stock)
    assert torch.equal(tiny.picture(pipe, steps=3), stock)


class _LastDimension(nn.Module):
    """Applies layers of the last dimension to `[B, C, H, W]`."""

    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, x):
        return self.layers(x.movedim(1, -1)).movedim(-1, 1)


def test_a_controlnet_shares_the_room_with_the_denoiser(device):
    base = tiny.sd()
    controlnet = ControlNetModel.from_unet(base.unet, conditioning_embedding_out_channels=(8, 8, 16, 16)).eval()
    parts = {name: part for name, part in base.components.items() if name != "safety_checker"}
    pipe = turbo(
        StableDiffusionControlNetPipeline(
            **parts, controlnet=controlnet, safety_checker=None, requires_safety_checker=False
        )
    )
    pipe.set_progress_bar_config(disable=True)
    arguments = {"image": torch.ones(1, 3, 64, 64), "height": 64, "width": 64}
    # it has no part in the first of four steps
    arguments |= {"control_guidance_start": 0.3, "steps": 4}
    stock = tiny.picture(pipe, **arguments)
    pipe.enable_partial_offload(500_000, device="cpu:0")
    device.watch(pipe)
    for _ in range(2):
        assert torch.equal(tiny.picture(pipe, **arguments), stock)
    residency = residency_of(pipe)
    assert list(residency.looped) == ["controlnet", "unet"]
    assert len({unit for group in residency.layers.groups for unit in group.units}) == len(residency.layers.units)
    device.peaks.clear()
    device.moved = True
    assert torch.equal(tiny.picture(pipe, **arguments), stock)
    assert device.peaks["unet"] + device.peaks["controlnet"] <= 500_000


def test_it_takes_its_turn_with_the_other_offloads():
    pipe = turbo(tiny.sd())
    stock, before = tiny.picture(pipe), state_of(pipe)
    pipe.enable_partial_offload(700_000, device="cpu:0")
    tiny.picture(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(tiny.picture(pipe), stock)
    pipe.enable_partial_offload(0, device="cpu:0")
    pipe.enable_channels_last()
    tiny.picture(pipe)
    assert [lever.in_force for lever in pipe.turbo_report().levers if lever.slot == "offload"] == [False, True]
    pipe.turbo_undo()
    assert differences(before, state_of(pipe)) == []


def test_a_copy_streams_its_own_weights():
    pipe = turbo(tiny.sd())
    stock = tiny.picture(pipe)
    pipe.enable_partial_offload(700_000, device="cpu:0")
    tiny.picture(pipe)
    twin = copy.deepcopy(pipe)
    with torch.no_grad():
        twin.unet.conv_out.weight.zero_()
    assert torch.equal(tiny.picture(pipe), stock)
    assert not torch.equal(tiny.picture(twin), stock)
