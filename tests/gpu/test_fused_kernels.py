"""Fused kernels in full-size UNets and decoders on a GPU: no further from fp32 than stock, also recorded as graphs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusers_turbo import turbo
from diffusers_turbo.actions.tf32 import fp32_precision
from diffusers_turbo.parity import EXACT_RATIO, distance
from tests import full_size, tiny
from tests.kernels.checking import randn, rms_error
from tests.state import differences, state_of

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

HALF = [torch.float16, torch.bfloat16]


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def pipe(request: pytest.FixtureRequest) -> Any:
    """One pipeline of each architecture: each test must leave it as it found it."""
    made = turbo(full_size.build(request.param))
    yield made
    del made
    torch.cuda.empty_cache()


@torch.no_grad()
def step(unet: Any, dtype: torch.dtype) -> Tensor:
    """One step with guidance, 512 x 512 pixels, `[2, 4, 64, 64]`."""
    side, like = 64, {"dtype": dtype, "device": "cuda"}
    given: dict[str, Any] = {}
    if unet.config.addition_embed_type == "text_time":
        sizes = torch.tensor([[512, 512, 0, 0, 512, 512]] * 2, **like)
        given = {"added_cond_kwargs": {"text_embeds": randn(2, 1280, **like), "time_ids": sizes}}
    context = randn(2, 77, unet.config.cross_attention_dim, seed=1, **like)
    return unet(randn(2, 4, side, side, **like), 500, context, **given).sample


@torch.no_grad()
def decoded(vae: Any, dtype: torch.dtype) -> Tensor:
    """A picture of 512 x 512 pixels."""
    return vae.decode(randn(1, 4, 64, 64, dtype=dtype, device="cuda")).sample


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(("part", "call"), [("unet", step), ("vae", decoded)], ids=["step", "decode"])
def test_no_further_from_fp32_than_stock(pipe, part, call, dtype):
    stock = copy.deepcopy(getattr(pipe, part)).to(dtype)
    naive = copy.deepcopy(stock).float()
    naive.set_default_attn_processor()
    with fp32_precision("ieee"):
        truth = call(naive, torch.float32).double()
    del naive
    stock_error = rms_error(call(stock, dtype), truth)
    original = getattr(pipe, part)
    setattr(pipe, part, stock)
    try:
        pipe.enable_channels_last()
        pipe.enable_fused_kernels()
        error = rms_error(call(stock, dtype), truth)
        told = str(pipe.turbo_report())
    finally:
        pipe.turbo_undo()
        setattr(pipe, part, original)
    print(f"{part} {dtype}: stock {stock_error:.2e}, with kernels {error:.2e}\n{told}")
    assert "plain PyTorch" not in told
    assert error <= EXACT_RATIO * stock_error


@pytest.mark.slow
def test_the_instant_tier_and_undo(pipe):
    """Channels-last, fused projections, kernels, work ahead, a loop that never waits and graphs, all at once."""

    def picture() -> Tensor:
        latents = randn(1, 4, 64, 64, dtype=torch.float16, device="cuda")
        given = {"height": 512, "width": 512, "latents": latents, "num_inference_steps": 4, "output_type": "pt"}
        return pipe("a red cat", **given).images.float().cpu()

    stock = picture()
    repeatable = torch.equal(picture(), stock)
    before = state_of(pipe)
    pipe.enable_channels_last()
    pipe.fuse_qkv_projections()
    pipe.enable_fused_kernels()
    pipe.enable_pointwise_matmul()
    pipe.enable_time_projections()
    pipe.enable_prompt_projections()
    eager = picture()
    pipe.enable_sync_free_loop()
    pipe.enable_cuda_graphs()
    for _ in range(3):
        ours = picture()
        print(distance(ours, stock), distance(ours, eager))
        assert distance(ours, stock).psnr_db >= 40
        assert distance(ours, eager).psnr_db >= 60
    told = str(pipe.turbo_report())
    print(told)
    assert "plain PyTorch" not in told
    assert "UNet2DConditionModel: 1 captured" in told
    assert told.count("(1 captured, 1 kept, 2 replays)") == 2  # what is computed ahead
    assert pipe.turbo_undo().left_alone == ()
    assert differences(before, state_of(pipe)) == []
    if repeatable:
        assert torch.equal(picture(), stock)


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")  # torch records one to set its graphs up
@pytest.mark.parametrize("make", [tiny.sd, tiny.sdxl], ids=["sd", "sdxl"])
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_within_a_compiled_unet(make, mode):
    pipe = turbo(make().to("cuda", torch.float16))
    stock = tiny.picture(pipe, steps=4)
    pipe.enable_channels_last()
    pipe.enable_fused_kernels()
    pipe.compile_unet(fullgraph=True, mode=mode)
    for _ in range(2):
        assert distance(tiny.picture(pipe, steps=4), stock).psnr_db >= 40
    assert "plain PyTorch" not in str(pipe.turbo_report())


def test_moved_to_the_cpu_it_runs_plainly_and_says_so():
    pipe = turbo(tiny.sd().to("cuda"))
    pipe.enable_channels_last()
    pipe.enable_fused_kernels()
    on_gpu = tiny.picture(pipe)
    pipe.to("cpu")
    assert distance(tiny.picture(pipe), on_gpu).psnr_db >= 60
    assert "it does not take torch.float32 on cpu here" in str(pipe.turbo_report())


def variants() -> int:
    """How many variants of our kernels Triton holds in this process."""
    from diffusers_turbo.kernels import add_layer_norm, bias_residual, geglu, group_norm_device, upsample_conv

    held = 0
    for module in (add_layer_norm, bias_residual, geglu, group_norm_device, upsample_conv):
        for kernel in vars(module).values():
            if hasattr(kernel, "device_caches"):
                held += sum(len(caches[0]) for caches in kernel.device_caches.values())
    return held


def test_the_first_picture_compiles_no_kernel(pipe):
    pipe.enable_channels_last()
    pipe.enable_fused_kernels()
    try:
        assert "variants of kernels compiled, or found compiled, in " in str(pipe.turbo_report())
        before = variants()
        step(pipe.unet, torch.float16)
        if not pipe.vae.config.force_upcast:
            decoded(pipe.vae, torch.float16)
        assert before > 0
        assert variants() == before
    finally:
        pipe.turbo_undo()
