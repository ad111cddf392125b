"""Drop-in on whole models: UNet, added-KV UNet, VAE, PixArt, SD3; no graph break, IP-Adapter and LoRA left whole."""

from __future__ import annotations

import copy
from functools import cache
from itertools import cycle
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from diffusers.models.attention_processor import AttnAddedKVProcessor2_0, AttnProcessor2_0, JointAttnProcessor2_0

from diffusers_turbo.attention import SDPAAttnProcessor, attention_layers, layer_kind, read_layer, why_kept
from tests import dynamo, tiny
from tests.attention.cases import MAKERS, every_gpu_processor, every_processor
from tests.attention.reference import distance


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


def unclip_unet() -> UNet2DConditionModel:
    """As UnCLIP, DeepFloyd and Kandinsky: cross-attention with added keys and values inside the resnet blocks."""
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=4,
        resnet_time_scale_shift="scale_shift",
    ).eval()


def sd3() -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        out_channels=4,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    ).eval()


@cache
def model_and_inputs(name: str) -> tuple[torch.nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    latents = noise(2, 4, 8, 8)
    if name == "unet":
        mask = torch.ones(2, 7)
        mask[0, 4:] = 0
        inputs = {"encoder_hidden_states": noise(2, 7, tiny.CONTEXT), "encoder_attention_mask": mask}
        return tiny.unet(), {"sample": latents, "timestep": 3} | inputs
    if name == "unclip":
        return unclip_unet(), {"sample": latents, "timestep": 3, "encoder_hidden_states": noise(2, 7, 16)}
    if name == "vae":
        return tiny.vae(), {"sample": noise(1, 3, 32, 32)}
    if name == "pixart":
        mask = torch.ones(2, 7)
        mask[1, 5:] = 0
        inputs = {"encoder_hidden_states": noise(2, 7, tiny.CONTEXT), "encoder_attention_mask": mask}
        sizes = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
        return tiny.pixart().transformer, {"hidden_states": latents, "timestep": torch.tensor([3, 3])} | inputs | sizes
    inputs = {"encoder_hidden_states": noise(2, 7, 32), "pooled_projections": noise(2, 16)}
    return sd3(), {"hidden_states": latents, "timestep": torch.tensor([3, 3])} | inputs


@cache
def stock_output(name: str) -> torch.Tensor:
    return run(*model_and_inputs(name))


def run(model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0]


def put(model: torch.nn.Module, processor: Any) -> None:
    for attn in attention_layers(model).values():
        attn.set_processor(processor)


MODELS = {
    "unet": (AttnProcessor2_0, {"plain"}),
    "unclip": (AttnAddedKVProcessor2_0, {"added_kv"}),
    "vae": (AttnProcessor2_0, {"plain"}),
    "pixart": (AttnProcessor2_0, {"plain"}),
    "sd3": (JointAttnProcessor2_0, {"joint", "plain"}),
}


@pytest.fixture(params=MODELS)
def name(request):
    """Name of a model, which is given its stock processors back afterwards."""
    stock_output(request.param)
    yield request.param
    put(model_and_inputs(request.param)[0], MODELS[request.param][0]())


def test_stock_layers_are_what_the_registry_takes_them_for(name):
    layers = attention_layers(model_and_inputs(name)[0]).values()
    assert {layer_kind(attn) for attn in layers} == MODELS[name][1]
    assert {type(attn.processor) for attn in layers} == {MODELS[name][0]}
    assert all(why_kept(attn.processor, layer_kind(attn)) is None for attn in layers)


@every_processor
def test_drop_in(maker, name):
    model, inputs = model_and_inputs(name)
    put(model, maker())
    assert distance(run(model, inputs), stock_output(name)) < 1e-5


def test_sdpa_is_bit_identical_to_stock(name):
    model, inputs = model_and_inputs(name)
    put(model, SDPAAttnProcessor())
    assert torch.equal(run(model, inputs), stock_output(name))


def small_unet() -> torch.nn.Module:
    return tiny.unet(
        block_out_channels=(16,), down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",)
    )


def small_vae() -> torch.nn.Module:
    return tiny.vae(
        block_out_channels=(16,), down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",)
    )


TRACED = {
    # Eight attention layers or two: each processor is on one of them, and in the next round on another.
    "unet": (lambda: (small_unet(), model_and_inputs("unet")[1] | {"sample": noise(2, 4, 6, 6)}), 2),
    "pixart": (lambda: model_and_inputs("pixart"), 2),
    "vae": (lambda: (small_vae(), {"sample": noise(1, 3, 6, 6)}), 4),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TRACED)
def test_no_graph_break(name):
    (model, inputs), rounds = TRACED[name][0](), TRACED[name][1]
    makers = cycle(MAKERS.values())
    for _ in range(rounds):
        for attn in attention_layers(model).values():
            attn.set_processor(next(makers)())
        dynamo.reset()
        with torch.no_grad():
            found = torch._dynamo.explain(model)(**inputs, return_dict=False)
        assert found.break_reasons == []
        assert found.graph_break_count == 0
    put(model, AttnProcessor2_0())


@every_processor
def test_gradients_reach_every_weight(maker):
    model, inputs = model_and_inputs("unet")
    gradients = []
    for processor in (AttnProcessor2_0(), maker()):
        put(model, processor)
        loss = model(**inputs, return_dict=False)[0].square().sum()
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    put(model, AttnProcessor2_0())
    size = max(gradient.abs().max().item() for gradient in gradients[0])
    for stock, ours in zip(*gradients, strict=True):
        assert (ours - stock).abs().max().item() < 1e-5 * size


def test_lora_is_in_force_with_fused_projections():
    from peft import LoraConfig

    torch.manual_seed(0)
    unet, inputs = tiny.unet(), model_and_inputs("unet")[1]
    unet.fuse_qkv_projections()
    put(unet, SDPAAttnProcessor())
    plain = run(unet, inputs)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False))
    adapted = run(unet, inputs)
    assert distance(adapted, plain) > 1e-3
    put(unet, AttnProcessor2_0())
    assert distance(adapted, run(unet, inputs)) < 1e-5
    unet.disable_adapters()
    put(unet, SDPAAttnProcessor())
    assert distance(run(unet, inputs), plain) < 1e-5


@pytest.mark.gpu
@every_gpu_processor
def test_drop_in_on_a_gpu_in_channels_last_and_half_precision(maker, name):
    wanted = stock_output(name)
    stock, inputs = model_and_inputs(name)
    model = copy.deepcopy(stock).to("cuda", torch.float16)
    if name != "pixart":
        model.to(memory_format=torch.channels_last)
    for layer_name, attn in attention_layers(model).items():
        # Flash takes no mask, which the cross-attention of these models is given.
        layer = read_layer(layer_name, attn, masked=attn.is_cross_attention)
        attn.set_processor(SDPAAttnProcessor() if maker().reasons_here(layer) else maker())
    assert distance(run(model, on_gpu(inputs)).cpu(), wanted) < 0.02


def on_gpu(inputs: dict[str, Any]) -> dict[str, Any]:
    moved = {key: value.cuda() for key, value in inputs.items() if isinstance(value, torch.Tensor)}
    return inputs | {key: value.half() if value.is_floating_point() else value for key, value in moved.items()}
