"""On a GPU: a 4K picture within 8 GB, 32 pictures within 8 GB, and what the tiled decode itself holds."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from diffusers_turbo import turbo
from diffusers_turbo.actions.tf32 import fp32_precision
from diffusers_turbo.facts.pipeline import read_pipeline
from diffusers_turbo.planning.memory import estimate_memory
from diffusers_turbo.planning.options import VAETiling
from tests import full_size

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.timeout(900)]

CARD_BYTES = 8 * 10**9
CONTEXT_BYTES = 600 * 2**20
"""More than a CUDA context takes on any card that was measured here; it comes off what a card can give."""


@pytest.fixture(scope="module")
def pipe() -> Any:
    made = turbo(full_size.build("sd15"))
    made.set_progress_bar_config(disable=True)
    yield made
    del made
    torch.cuda.empty_cache()


def peak_bytes(work: Callable[[], Any]) -> int:
    """Peak allocated bytes while some work runs."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


@pytest.mark.parametrize(("height", "width", "batch", "tile"), [(2224, 3840, 1, 512), (512, 512, 32, 256)])
def test_large_pictures_and_large_batches_fit_into_8_gb(pipe, height, width, batch, tile):
    pipe.enable_vae_tiling(tile_size=tile)
    pipe.enable_model_cpu_offload()
    made = []

    def call() -> None:
        images = pipe(["a red cat"] * batch, height=height, width=width, num_inference_steps=2, output_type="pt").images
        made.append((tuple(images.shape), bool(images.isfinite().all())))

    try:
        peak = peak_bytes(call)
    finally:
        pipe.turbo_undo()
    print(f"{height}x{width} batch {batch}: {peak / 2**20:.0f} MiB")
    assert made == [((batch, 3, height, width), True)]
    assert peak <= CARD_BYTES - CONTEXT_BYTES


@torch.no_grad()
def test_a_tiled_decode_holds_the_canvas_and_one_tile(pipe):
    pipe.to("cuda")
    latents = torch.randn(1, 4, 278, 480, generator=torch.Generator().manual_seed(0)).to("cuda", torch.float16)
    pipe.enable_vae_tiling(tile_size=512)
    try:
        ours = peak_bytes(lambda: pipe.vae.decode(latents))
        host = type(pipe.vae).tiled_decode.__get__(pipe.vae)
        stock = peak_bytes(lambda: host(latents))
    finally:
        pipe.turbo_undo()
    print(f"tiled decode of 3840x2224: ours {ours / 2**20:.0f} MiB, diffusers' {stock / 2**20:.0f} MiB")
    assert ours < stock
    estimate = estimate_memory(read_pipeline(pipe), 2224, 3840, 1, [VAETiling(tile_size=512)])
    assert 0.9 <= estimate.stage("decode").peak_bytes / ours <= 1.15


@pytest.mark.parametrize("switches", [(), ("enable_channels_last", "enable_pointwise_matmul", "enable_fused_kernels")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("hold_on", "share"), [("device", 2), ("host", 5)])
def test_exact_tiles_give_the_untiled_decode_in_a_part_of_its_memory(pipe, dtype, switches, hold_on, share):
    vae, found, seconds = pipe.vae.to(dtype), {}, {}
    latents = torch.randn(1, 4, 128, 128, generator=torch.Generator().manual_seed(0)).to("cuda", dtype)
    held = torch.cuda.memory_allocated()

    def decode(name: str) -> int:
        def call() -> None:
            with torch.no_grad(), fp32_precision("ieee"):  # cuDNN convolves in TF32 otherwise
                found[name] = vae.decode(latents).sample.float().cpu()

        call()
        start = time.perf_counter()
        peak = peak_bytes(call)
        seconds[name] = time.perf_counter() - start
        return peak - held

    try:
        for action in switches:
            getattr(pipe, action)()
        whole = decode("whole")
        pipe.enable_vae_exact_tiling(tile_size=256, hold_on=hold_on)
        tiled = decode("tiled")
    finally:
        pipe.turbo_undo()
        pipe.vae.to(torch.float16)
    took = " and ".join(f"{seconds[name]:.3f} s" for name in ("whole", "tiled"))
    print(f"{dtype} on the {hold_on} {switches}: {whole >> 20} and {tiled >> 20} MiB, {took}")
    spread = found["whole"].std().item()
    assert (found["tiled"] - found["whole"]).square().mean().sqrt() < (
        1e-5 if dtype == torch.float32 else 1e-2
    ) * spread
    assert tiled < whole / share
