"""Offload: what the hooks leave behind is put back, and what the user loads meanwhile survives."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_module
from peft import LoraConfig

from diffusers_turbo import TurboError, turbo
from diffusers_turbo.actions.offload import Placement
from tests import tiny
from tests.state import differences, state_of


def test_sequential_hooks_come_off_with_every_parameter_object_and_bit():
    """The CPU stands in for the GPU; diffusers' own method asks for "cpu:0", which is not "cpu" to accelerate."""
    pipe = turbo(tiny.sd())
    stock, before = tiny.picture(pipe), state_of(pipe)
    placement = Placement.of(pipe)
    for module in (pipe.unet, pipe.vae, pipe.text_encoder):
        cpu_offload(module, torch.device("cpu"), offload_buffers=len(module._parameters) > 0)
    assert pipe.unet.conv_in.weight.device.type == "meta"
    assert torch.equal(tiny.picture(pipe), stock)
    placement.revert()
    assert differences(before, state_of(pipe)) == []
    assert torch.equal(tiny.picture(pipe), stock)


def test_weights_changed_under_sequential_hooks_keep_their_new_values():
    pipe = turbo(tiny.sd())
    placement = Placement.of(pipe)
    weight = pipe.unet.conv_in.weight
    cpu_offload(pipe.unet, torch.device("cpu"))
    pipe.unet.conv_in._hf_hook.weights_map["weight"].add_(1)
    expected = weight.detach().clone()
    placement.revert()
    assert pipe.unet.conv_in.weight is weight
    assert torch.equal(pipe.unet.conv_in.weight, expected)


def test_sequential_on_a_cpu_is_refused():
    pipe = turbo(tiny.sd())
    with pytest.raises(TurboError, match="found device cpu, where the weights wait already"):
        pipe.enable_sequential_cpu_offload(device="cpu")


@pytest.mark.skipif(torch.accelerator.is_available(), reason="only without an accelerator")
@pytest.mark.parametrize(
    "method", ["enable_model_cpu_offload", "enable_sequential_cpu_offload", "enable_group_offload"]
)
def test_offload_without_an_accelerator_is_refused(method):
    pipe = turbo(tiny.sd())
    before = state_of(pipe)
    with pytest.raises(TurboError, match=f"{method}.*no accelerator on this machine"):
        getattr(pipe, method)()
    assert differences(before, state_of(pipe)) == []


def test_hooks_of_others_are_refused():
    pipe = turbo(tiny.sd())
    cpu_offload(pipe.unet, torch.device("cpu"))
    with pytest.raises(TurboError, match="offload hooks on `unet` that this package did not set"):
        pipe.enable_model_cpu_offload(device="cpu")


def test_each_offload_replaces_the_other_and_comes_back_below():
    pipe = turbo(tiny.sd())
    before = state_of(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    pipe.enable_group_offload("cpu")
    assert not hasattr(pipe, "_all_hooks")
    assert [lever.in_force for lever in pipe.turbo_report().levers] == [False, True]
    pipe.disable_offload()
    assert differences(before, state_of(pipe)) == []


def test_model_offload_survives_calls_and_ends():
    """diffusers re-applies the hooks at the end of each call through the method that this package overrides."""
    pipe = turbo(tiny.sd())
    stock, before = tiny.picture(pipe), state_of(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(3):
        assert torch.equal(tiny.picture(pipe), stock)
    assert len(pipe.turbo_report().levers) == 1
    pipe.disable_offload()
    assert differences(before, state_of(pipe)) == []


def test_group_offload_moves_an_upcast_vae_as_a_whole():
    pipe = turbo(tiny.sdxl())
    pipe.enable_half_precision("float16")
    stock = tiny.picture(pipe)
    before = state_of(pipe)
    pipe.enable_group_offload("cpu", offload_type="leaf_level")
    assert "vae is moved as a whole" in str(pipe.turbo_report())
    assert torch.equal(tiny.picture(pipe), stock)
    pipe.disable_offload()
    assert differences(before, state_of(pipe)) == []


def test_what_another_offload_took_over_in_the_call_is_left_to_it():
    """As when memory runs out under group offload, and offload by layers is the next step; its weights are meta."""
    pipe = turbo(tiny.sdxl())
    pipe.enable_half_precision("float16")
    pipe.enable_group_offload("cpu", offload_type="leaf_level")
    stock, hand_over = tiny.picture(pipe), pipe.unet.register_forward_hook(lambda *_: taken_over())

    def taken_over() -> None:
        hand_over.remove()
        remove_hook_from_module(pipe.vae)
        cpu_offload(pipe.vae, torch.device("cpu"))

    assert torch.equal(tiny.picture(pipe), stock)
    assert pipe.vae.decoder.conv_in.weight.device.type == "meta"


def test_a_lora_loaded_under_offload_stays():
    pipe = turbo(tiny.sd())
    pipe.enable_group_offload("cpu", offload_type="leaf_level")
    pipe.disable_offload()
    pipe.enable_model_cpu_offload(device="cpu")
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    under_offload = tiny.picture(pipe)
    pipe.turbo_undo()
    assert any("lora" in name for name, _ in pipe.unet.named_parameters())
    assert torch.equal(tiny.picture(pipe), under_offload)
