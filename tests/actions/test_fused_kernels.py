"""`enable_fused_kernels()` in whole pipelines: stock's picture, what it says of itself, and its life among the rest.

In this process plain PyTorch takes the kernels' place (conftest.py), so that all but the kernels is real; these have
tests of their own, and `tests/kernels/launched/test_unet_step.py` has both together.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from peft import LoraConfig
from torch import nn

from diffusers_turbo import TurboError, turbo
from diffusers_turbo.fused.blocks import successors
from diffusers_turbo.graphs.capture import CAPTURES
from diffusers_turbo.kernels import KERNELS, base
from diffusers_turbo.parity import distance
from tests import tiny
from tests.compilation import micro
from tests.graphs.fake import FakeCapture
from tests.state import differences, state_of


def linear_projections() -> Any:
    """As SD2: the transformers' images come with their channels outermost."""
    pipe = tiny.sd()
    pipe.unet = tiny.unet(use_linear_projection=True)
    return pipe


def told(pipe: Any) -> str:
    return str(pipe.turbo_report())


@pytest.mark.parametrize("make", [tiny.sd, linear_projections, tiny.sdxl, tiny.pixart], ids=lambda make: make.__name__)
def test_channels_last_every_layer_runs_a_kernel(make, kernel_calls):
    pipe = turbo(make())
    stock = tiny.picture(pipe)
    pipe.enable_channels_last()
    pipe.enable_fused_kernels()
    assert distance(tiny.picture(pipe), stock).psnr_db >= 90
    assert kernel_calls["group_norm"] >= 20
    assert "plain PyTorch" not in told(pipe)
    if make is not tiny.pixart:
        assert "group_norm: 43 of 57 layers ran the kernel at their last call, 14 not called yet" in told(pipe)
        assert kernel_calls["geglu"] > 0
        blocks = [module for module in pipe.unet.modules() if isinstance(module, BasicTransformerBlock)]
        pairs = [pair for module in pipe.unet.modules() for pair in successors(module)]
        calls = (kernel_calls["geglu"] + kernel_calls["linear_geglu"]) // len(blocks)
        assert kernel_calls["add_layer_norm"] == calls * (2 * len(blocks) + len(pairs))
        assert kernel_calls["layer_norm"] == calls * (len(blocks) - len(pairs))
        assert bool(pairs) == (make is tiny.sdxl)
    else:
        assert "2 left to diffusers: a transformer block with norms of kind ada_norm_single" in told(pipe)


def test_without_channels_last_the_bits_stay_and_the_report_says_what_to_do(pipe, kernel_calls):
    stock = tiny.picture(turbo(pipe))
    pipe.enable_fused_kernels()
    assert "unet is not channels-last, without which few layers fit: enable_channels_last() first" in told(pipe)
    assert "group_norm: 0 of 57 layers ran the kernel at their last call, 57 not called yet" in told(pipe)
    assert torch.equal(tiny.picture(pipe), stock)
    assert "layers of group_norm ran in plain PyTorch (vae.decoder.conv_norm_out): channels are not innermost" in told(
        pipe
    )
    pipe.enable_channels_last()
    tiny.picture(pipe)
    assert "plain PyTorch" not in told(pipe)
    assert "first" not in told(pipe)


@pytest.mark.parametrize("kernel", KERNELS)
def test_each_kernel_alone(pipe, kernel, kernel_calls):
    stock = tiny.picture(turbo(pipe))
    pipe.enable_channels_last()
    pipe.enable_fused_kernels(**{name: name == kernel for name in KERNELS})
    assert distance(tiny.picture(pipe), stock).psnr_db >= 90
    assert [name for name in KERNELS if kernel_calls[name]] == [kernel]
    with pytest.raises(TurboError, match="group_norm = False; needed: at least one of the kernels"):
        pipe.enable_fused_kernels(**dict.fromkeys(KERNELS, False))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_no_further_from_fp32_than_stock(dtype, kernel_calls):
    pipe = turbo(tiny.sdxl())
    reference = tiny.picture(pipe)
    pipe.enable_channels_last()
    pipe.enable_half_precision(dtype)
    half = distance(tiny.picture(pipe), reference)
    pipe.enable_fused_kernels()
    ours = distance(tiny.picture(pipe), reference)
    assert kernel_calls["group_norm"] > 0
    assert ours.rmse <= 1.25 * half.rmse


def test_adapters_come_and_go(pipe, kernel_calls):
    stock = tiny.picture(turbo(pipe))
    layers = ["to_q", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "conv_shortcut", "time_emb_proj", "conv_out"]
    torch.manual_seed(0)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=layers, init_lora_weights=False))
    adapted = tiny.picture(pipe)
    assert distance(adapted, stock).psnr_db < 60
    pipe.enable_channels_last()
    pipe.enable_fused_kernels()
    assert distance(tiny.picture(pipe), adapted).psnr_db >= 90
    pipe.unet.delete_adapters(pipe.unet.active_adapters())
    pipe.unload_lora_weights()
    assert distance(tiny.picture(pipe), stock).psnr_db >= 90
    assert "plain PyTorch" not in told(pipe)
    assert pipe.turbo_undo().left_alone == ()


@pytest.mark.parametrize("carry", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_a_copy_has_kernels_of_its_own(pipe, carry):
    turbo(pipe).enable_fused_kernels()
    ours, before = tiny.picture(pipe), state_of(pipe)
    twin = carry(pipe)
    assert torch.equal(tiny.picture(twin), ours)
    for name, module in twin.unet.named_modules():
        if "forward" in vars(module):
            assert module.forward.module is module, name
    assert twin.turbo_undo().left_alone == ()
    assert not any("forward" in vars(module) for module in twin.unet.modules())
    assert differences(before, state_of(pipe)) == []


OFFLOADS: dict[str, Callable[[Any], None]] = {
    "model": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "block": lambda pipe: pipe.enable_group_offload("cpu"),
    "leaf": lambda pipe: pipe.enable_group_offload("cpu", offload_type="leaf_level"),
    "partial": lambda pipe: pipe.enable_partial_offload(700_000, device="cpu"),
}


@pytest.mark.parametrize("offload", OFFLOADS.values(), ids=OFFLOADS)
@pytest.mark.parametrize("first", ["kernels", "offload"])
def test_offload_goes_around_the_kernels_in_any_order(pipe, offload, first, kernel_calls):
    tiny.picture(turbo(pipe))
    before = state_of(pipe)
    pipe.enable_channels_last()
    alone = tiny.picture(pipe)
    for what in (first, "offload" if first == "kernels" else "kernels"):
        pipe.enable_fused_kernels() if what == "kernels" else offload(pipe)
    assert distance(tiny.picture(pipe), alone).psnr_db >= 90
    ran = dict(kernel_calls)
    assert "plain PyTorch" not in told(pipe)
    assert ran["group_norm"] >= 40
    assert ran["add_layer_norm"] == 2 * (ran["geglu"] + ran["linear_geglu"]) > 0
    (pipe.disable_fused_kernels if first == "kernels" else pipe.disable_offload)()
    assert distance(tiny.picture(pipe), alone).psnr_db >= 90
    assert (dict(kernel_calls) == ran) == (first == "kernels")
    assert pipe.turbo_undo().left_alone == ()
    assert differences(before, state_of(pipe)) == []


def test_a_compiled_unet_is_compiled_anew_with_the_kernels_on_and_off(kernel_calls):
    pipe = micro.sd()
    stock = tiny.picture(pipe, steps=1)
    pipe.unet = pipe.unet.to(memory_format=torch.channels_last)
    pipe.compile_unet(backend="eager")
    pipe.enable_fused_kernels(geglu=False, add_layer_norm=False)
    compiled = pipe.unet._compiled_call_impl
    assert compiled is not None
    assert distance(tiny.picture(pipe, steps=1), stock).psnr_db >= 90
    assert kernel_calls["group_norm"] > 0
    pipe.disable_fused_kernels()
    assert pipe.unet._compiled_call_impl is not compiled
    assert pipe.unet._compiled_call_impl is not None
    pipe.turbo_undo()
    assert pipe.unet._compiled_call_impl is None


def test_graphs_are_recorded_anew_with_the_kernels_on_and_off(pipe, kernel_calls, monkeypatch):
    monkeypatch.setitem(CAPTURES, "cpu", FakeCapture)
    turbo(pipe).enable_channels_last()
    stock = tiny.picture(pipe, steps=3)
    pipe.enable_cuda_graphs()
    for _ in range(2):
        assert torch.equal(tiny.picture(pipe, steps=3), stock)
    pipe.enable_fused_kernels()
    assert "UNet2DConditionModel: 0 captured" in told(pipe)
    for _ in range(2):
        assert distance(tiny.picture(pipe, steps=3), stock).psnr_db >= 90
    assert "UNet2DConditionModel: 1 captured, 1 kept, 5 replays" in told(pipe)
    assert kernel_calls["geglu"] + kernel_calls["linear_geglu"] == 2 * 4  # one eager step, and the recorded one
    pipe.disable_fused_kernels()
    for _ in range(2):
        assert torch.equal(tiny.picture(pipe, steps=3), stock)
    pipe.turbo_undo()


def test_forwards_of_others_stay_and_are_counted(pipe, kernel_calls):
    stock = tiny.picture(turbo(pipe))
    resnet = pipe.unet.mid_block.resnets[0]
    block = pipe.unet.mid_block.attentions[0].transformer_blocks[0]
    hooked = (resnet.norm2, block.norm3, pipe.unet.conv_act)
    for module in hooked:
        module.forward = type(module).forward.__get__(module)
    theirs = [module.forward for module in hooked]
    pipe.enable_channels_last()
    pipe.enable_fused_kernels()
    assert [module.forward for module in hooked] == theirs
    assert "3 left to diffusers: something else replaced its forward" in told(pipe)
    assert distance(tiny.picture(pipe), stock).psnr_db >= 90
    pipe.turbo_undo()
    assert [module.forward for module in hooked] == theirs


def test_a_forward_replaced_meanwhile_stays_and_is_reported(pipe):
    turbo(pipe).enable_fused_kernels()
    norm = pipe.unet.conv_norm_out
    norm.forward = theirs = type(norm).forward.__get__(norm)
    assert any("GroupNorm.forward was set to" in sentence for sentence in pipe.turbo_undo().left_alone)
    assert norm.forward == theirs


def test_parameters_and_saving_are_untouched(pipe, tmp_path):
    turbo(pipe)
    names, parameters = list(pipe.unet.state_dict()), list(pipe.unet.parameters())
    pipe.enable_fused_kernels()
    assert list(pipe.unet.state_dict()) == names
    assert all(one is other for one, other in zip(pipe.unet.parameters(), parameters, strict=True))
    pipe.save_pretrained(tmp_path)
    loaded = type(pipe.unet).from_pretrained(tmp_path / "unet")
    assert list(loaded.state_dict()) == names
    assert not any("forward" in vars(module) for module in loaded.modules())


def test_refused_where_no_kernel_runs(pipe, monkeypatch):
    before = state_of(turbo(pipe))
    monkeypatch.setattr(base, "triton_reasons", lambda: ("Triton is not installed",))
    for kernel in KERNELS.values():
        monkeypatch.setattr(type(kernel), "places", base.Kernel.places)
    needed = "needed: Triton and an NVIDIA GPU of SM 7.0 or newer"
    with pytest.raises(TurboError, match=rf"enable_fused_kernels\(\): found Triton is not installed.*{needed}"):
        pipe.enable_fused_kernels()
    assert differences(before, state_of(pipe)) == []


def test_refused_where_no_layer_fits(pixart_pipe):
    turbo(pixart_pipe).vae = nn.Identity()
    found = r"found nothing that fits in vae, transformer; 2 left to diffusers: .* kind ada_norm_single; needed: nn.Gro"
    with pytest.raises(TurboError, match=found):
        pixart_pipe.enable_fused_kernels()
