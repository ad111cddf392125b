"""Bad input: each a clear TurboError that says what was tried, found, needed and what to do; nothing half-applied."""

from __future__ import annotations

import sys

import pytest
import torch
from diffusers import FluxTransformer2DModel

from diffusers_turbo import DeviceFacts, TurboError, auto_optimize, plan, turbo
from diffusers_turbo.actions.layout import channels_last_strides, restrided
from tests import tiny
from tests.state import differences, state_of

CASES = {
    "impossible backend": (
        lambda pipe: pipe.enable_sdpa(backend="warp"),
        r"enable_sdpa\(backend='warp'\).*needed: one of 'auto', 'flash', 'efficient', 'cudnn', 'math'",
    ),
    "backend that no layer takes": (
        lambda pipe: pipe.enable_sdpa(backend="cudnn"),
        r"enable_sdpa\(\): found 8 layers of unet: SDPA cuDNN runs on cuda, the layer is on cpu",
    ),
    "slice size 0": (
        lambda pipe: pipe.enable_attention_slicing(0),
        r"slice_size = 0; needed: .*positive number of heads",
    ),
    "slice size above the heads": (
        lambda pipe: pipe.enable_attention_slicing(99),
        r"found slice_size=99; needed: at most 4, the layer's heads",
    ),
    "negative max_bytes": (
        lambda pipe: pipe.enable_attention_slicing(max_bytes=-1),
        r"max_bytes = -1; needed: a positive",
    ),
    "half precision that is none": (lambda pipe: pipe.enable_half_precision("int8"), r"dtype = 'int8'; needed: one of"),
    "tile not a multiple": (
        lambda pipe: pipe.enable_vae_tiling(tile_size=33),
        r"tile_size = 33; needed: a positive multiple",
    ),
    "tile too small": (lambda pipe: pipe.enable_vae_tiling(tile_size=8), r"tile_size 8; needed: at least 32 pixels"),
    "overlap above a half": (
        lambda pipe: pipe.enable_vae_tiling(tile_size=32, overlap=0.9),
        r"overlap = 0.9; needed: a fraction",
    ),
    "compile mode": (lambda pipe: pipe.compile_unet(mode="warp"), r"mode = 'warp'; needed: one of"),
    "a transformer that is not there": (
        lambda pipe: pipe.compile_transformer(),
        r"compile_transformer\(\): found no `transformer` in .*\(it has text_encoder, unet, vae\)",
    ),
    "trace size": (lambda pipe: pipe.trace_unet(height=100), r"height = 100; needed: a positive multiple of 8"),
    "group offload type": (
        lambda pipe: pipe.enable_group_offload("cpu", offload_type="atoms"),
        r"offload_type = 'atoms'; needed: one of 'block_level', 'leaf_level'",
    ),
    "stream on a cpu": (
        lambda pipe: pipe.enable_group_offload("cpu", offload_type="leaf_level", use_stream=True),
        r"enable_group_offload\(\): found ValueError: Using streams.*everything it had changed is undone",
    ),
    "negative size": (lambda pipe: plan(pipe, DeviceFacts.card("T4"), height=-8), r"height.*-8.*positive"),
    "size not a multiple": (lambda pipe: plan(pipe, DeviceFacts.card("T4"), width=70), r"width.*70.*multiple of 8"),
    "batch of nothing": (lambda pipe: plan(pipe, DeviceFacts.card("T4"), batch_size=0), r"batch_size.*0.*positive"),
    "unknown card": (lambda pipe: DeviceFacts.card("RTX 3061"), r"RTX 3061.*RTX 3060"),
    "budget": (lambda pipe: auto_optimize(pipe, vram_budget="lots"), r"vram_budget.*lots"),
    "dtype": (lambda pipe: auto_optimize(pipe, dtype="int4"), r"dtype.*int4"),
    "a device that is none": (lambda pipe: auto_optimize(pipe, device="gpu"), r"no device 'gpu'; needed: \"cpu\""),
    "a device that is not here": (lambda pipe: auto_optimize(pipe, device="cuda:99"), r"using cuda:99: found"),
}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_clear_error_and_nothing_applied(case):
    act, message = CASES[case]
    pipe = turbo(tiny.sd())
    before = state_of(pipe)
    with pytest.raises(TurboError, match=message) as raised:
        act(pipe)
    assert "What to do:" in str(raised.value)
    assert differences(before, state_of(pipe)) == []


def test_missing_xformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    pipe = turbo(tiny.sd())
    before = state_of(pipe)
    with pytest.raises(TurboError, match=r"importing xformers: found ModuleNotFoundError.*pip install xformers"):
        pipe.enable_xformers_memory_efficient_attention()
    assert differences(before, state_of(pipe)) == []


def test_tiling_on_a_vae_without_it():
    pipe = turbo(tiny.sd())
    # an autoencoder that can neither tile nor slice
    pipe.vae = torch.nn.Conv2d(3, 3, 1)
    for enable in (pipe.enable_vae_tiling, pipe.enable_vae_slicing):
        with pytest.raises(TurboError, match=r"found a Conv2d without enable_(tiling|slicing)\(\)"):
            enable()


def test_channels_last_without_convolutions():
    pipe = turbo(tiny.sd())
    for module in (pipe.unet, pipe.vae):
        for parameter in module.parameters():
            if parameter.dim() == 4:
                parameter.data = restrided(parameter.data, channels_last_strides(parameter.shape))
    with pytest.raises(TurboError, match=r"no 4-D weight to lay out anew"):
        pipe.enable_channels_last()


@pytest.mark.parametrize(
    "enable", ["enable_channels_last", "enable_half_precision", "fuse_qkv_projections", "trace_unet"]
)
def test_quantised_components_refuse_with_the_reason(enable):
    pipe = turbo(tiny.sd())
    pipe.unet.is_quantized = True
    with pytest.raises(TurboError, match=r"found unet is quantised \(is_quantized\)"):
        getattr(pipe, enable)()


@pytest.mark.parametrize("enable", ["enable_channels_last", "enable_half_precision", "enable_model_cpu_offload"])
def test_device_maps_refuse_with_the_reason(enable):
    pipe = turbo(tiny.sd())
    pipe.unet.hf_device_map = {"down_blocks": 0, "up_blocks": "cpu"}
    with pytest.raises(TurboError, match=r"found unet is spread by a device_map \(0, cpu\)"):
        getattr(pipe, enable)()


def test_a_switch_that_does_not_apply_to_a_transformer_says_so():
    pipe = turbo(tiny.pixart())
    with pytest.raises(TurboError, match=r"trace_unet\(\): found no `unet` in PixArtAlphaPipeline"):
        pipe.trace_unet()
    pipe.transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    with pytest.raises(TurboError, match=r"enable_naive_attention\(\): found no `Attention` layers in the transformer"):
        pipe.enable_naive_attention()
