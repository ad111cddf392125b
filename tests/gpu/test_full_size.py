"""Full-size SD1.5 and SDXL, text encoders included, through every method: effect, sound picture, no trace left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from diffusers_turbo import auto_optimize, turbo
from diffusers_turbo.parity import distance
from tests import full_size
from tests.state import differences, state_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]

# method, arguments, lowest PSNR in dB from stock in the same dtype (rounding leaves about 60; None: lossy)
METHODS: dict[str, tuple[str, dict[str, Any], float | None]] = {
    "naive": ("enable_naive_attention", {}, 40),
    "sdpa": ("enable_sdpa", {}, 40),
    "flash": ("enable_sdpa", {"backend": "flash"}, 40),
    "efficient": ("enable_sdpa", {"backend": "efficient"}, 40),
    "cudnn": ("enable_sdpa", {"backend": "cudnn"}, 40),
    "math": ("enable_sdpa", {"backend": "math"}, 40),
    "xformers": ("enable_xformers_memory_efficient_attention", {}, 40),
    "sliced": ("enable_attention_slicing", {}, 40),
    "sliced to 64 MiB": ("enable_attention_slicing", {"slice_size": None, "max_bytes": 64 * 2**20}, 40),
    "channels_last": ("enable_channels_last", {}, 40),
    "fused_qkv": ("fuse_qkv_projections", {}, 40),
    "tf32": ("enable_tf32", {}, None),
    "bfloat16": ("enable_half_precision", {"dtype": "bfloat16"}, None),
    "vae_slicing": ("enable_vae_slicing", {}, 40),
    "vae_tiling": ("enable_vae_tiling", {"tile_size": 256}, None),
    "fused_kernels": ("enable_fused_kernels", {}, 40),
    "sync_free_loop": ("enable_sync_free_loop", {}, 40),
    "model_offload": ("enable_model_cpu_offload", {}, 40),
    "group_offload": ("enable_group_offload", {"num_blocks_per_group": 1}, 40),
    "stream_offload": ("enable_group_offload", {"offload_type": "leaf_level", "use_stream": True}, 40),
    "partial_offload": ("enable_partial_offload", {"resident_bytes": "1GB"}, 40),
    "partial_offload of all": ("enable_partial_offload", {"resident_bytes": "60GB", "denoiser_leaves": True}, 40),
    "sequential_offload": ("enable_sequential_cpu_offload", {}, 40),
    "traced": ("trace_unet", {}, 40),
    "compiled blocks": ("compile_unet", {"regional": True}, 40),
    "compiled": ("compile_unet", {}, 40),
    "compiled_vae": ("compile_vae", {}, 40),
}


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def pipe(request: pytest.FixtureRequest) -> Any:
    """One pipeline of each architecture: each test must leave it as it found it."""
    made = turbo(full_size.build(request.param))
    yield made
    del made
    torch.cuda.empty_cache()


def picture(pipe: Any, steps: int = 2, batch: int = 1) -> torch.Tensor:
    """Pictures `[B, 3, 512, 512]` from fixed latents."""
    latents = torch.randn(batch, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    output = pipe(
        ["a red cat"] * batch,
        height=512,
        width=512,
        latents=latents.to(pipe._execution_device, pipe.unet.dtype),
        num_inference_steps=steps,
        output_type="pt",
    )
    return output.images.float().cpu()


@pytest.mark.parametrize("name", METHODS)
def test_method_and_undo(pipe, name):
    method, arguments, lowest_db = METHODS[name]
    if name == "compiled" and "XL" in type(pipe).__name__:
        pytest.skip("minutes of compilation; the blocks of this UNet are compiled by another case")
    batch = 2 if name == "vae_slicing" else 1
    stock = picture(pipe, batch=batch)
    repeatable = torch.equal(picture(pipe, batch=batch), stock)
    before = state_of(pipe)
    getattr(pipe, method)(**arguments)
    ours = picture(pipe, batch=batch)
    apart = distance(ours, stock)
    print(f"{type(pipe).__name__} {name}: {apart.psnr_db:.1f} dB")
    assert apart.broken == 0
    if lowest_db is not None:
        assert apart.psnr_db >= lowest_db
    report = pipe.turbo_undo()
    assert report.left_alone == ()
    assert differences(before, state_of(pipe)) == []
    if repeatable:
        assert torch.equal(picture(pipe, batch=batch), stock)


def peak_mib(work: Callable[[], Any]) -> float:
    """Peak allocated bytes while some work runs, in MiB."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**20


def test_offloads_need_less_memory_each_than_the_one_before(pipe):
    peaks = [peak_mib(lambda: picture(pipe))]
    for method, arguments in (
        ("enable_model_cpu_offload", {}),
        ("enable_group_offload", {"offload_type": "leaf_level", "use_stream": True}),
    ):
        getattr(pipe, method)(**arguments)
        peaks.append(peak_mib(lambda: picture(pipe)))
        pipe.turbo_undo()
    print([f"{peak:.0f} MiB" for peak in peaks])
    assert peaks[0] > peaks[1] > peaks[2]


def test_auto_optimize_applies_explains_and_comes_off(pipe):
    stock, before = picture(pipe), state_of(pipe)
    auto_optimize(pipe, height=512, width=512)
    report = pipe.turbo_report()
    print(report)
    assert report.plan is not None
    assert distance(picture(pipe), stock).psnr_db >= 40
    pipe.turbo_undo()
    assert differences(before, state_of(pipe)) == []


def test_auto_optimize_within_a_small_budget_fits(pipe):
    budget = 3 * 2**30 if "XL" in type(pipe).__name__ else 2**30
    auto_optimize(pipe, height=512, width=512, vram_budget=budget)
    try:
        assert any(lever.slot == "offload" for lever in pipe.turbo_report().levers)
        assert peak_mib(lambda: picture(pipe)) * 2**20 <= budget
    finally:
        pipe.turbo_undo()
