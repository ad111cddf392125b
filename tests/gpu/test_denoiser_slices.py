"""On a GPU: a batch in slices of the denoiser, as far from float32 as the whole batch, in the memory of a slice."""

from __future__ import annotations

import gc
import time

import pytest
import torch

from diffusers_turbo import auto_optimize, turbo
from diffusers_turbo.parity import distance
from tests import full_size
from tests.gpu.test_small_caps import cap

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.timeout(600)]


def picture(pipe, side, batch, steps=3):
    latents = torch.randn(batch, 4, side // 8, side // 8, generator=torch.Generator().manual_seed(0))
    size = {"height": side, "width": side, "num_inference_steps": steps, "output_type": "latent"}
    start = time.perf_counter()
    made = pipe(["a red cat"] * batch, latents=latents.half().cuda(), **size).images.float().cpu()
    return made, time.perf_counter() - start


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_a_batch_is_that_of_its_slices_in_less_memory(name):
    pipe, side = turbo(full_size.build(name)), 512
    stock, _ = picture(pipe, side, 4)
    found = {}
    for slice_size in (None, 2, 1):
        if slice_size is not None:
            pipe.enable_denoiser_slicing(slice_size)
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        made, seconds = picture(pipe, side, 4)
        found[slice_size] = torch.cuda.max_memory_allocated() - before
        print(f"{name}, {slice_size or 8} samples: {seconds:.2f} s, {found[slice_size] / 2**20:.0f} MiB over weights")
        # two ways to round in float16
        assert distance(made, stock).psnr_db > 40
    assert found[1] < found[2] < found[None] / 2
    pipe.enable_denoiser_slicing(2)
    pipe.enable_cuda_graphs()
    for _ in range(2):
        assert distance(picture(pipe, side, 4)[0], stock).psnr_db > 40
    assert "1 captured, 1 kept" in str(pipe.turbo_report())
    pipe.turbo_undo()
    assert torch.equal(picture(pipe, side, 4)[0], stock)


@pytest.mark.parametrize(("side", "batch", "gib"), [(1024, 1, 0.486), (512, 32, 1.0), (512, 32, 3.2)])
def test_what_fitted_in_no_other_way(side, batch, gib):
    """A picture of 1024 pixels on a card of 1 GB; 32 of 512 on one of 1.5, and on one of 4 with nothing moved."""
    pipe = turbo(full_size.build("sd15").to("cpu"))
    pipe.set_progress_bar_config(disable=True)
    size = {"height": side, "width": side}
    with cap(gib):
        auto_optimize(pipe, **size, batch_size=batch, vram_budget=int(gib * 2**30))
        for steps in (3, 3, 30):
            start = time.perf_counter()
            made = pipe(["a red cat"] * batch, **size, num_inference_steps=steps, output_type="pt").images
            assert torch.isfinite(made).all()
            del made
            print(f"{batch} of {side} under {gib} GiB, {steps} steps: {time.perf_counter() - start:.2f} s")
        reserved = torch.cuda.max_memory_reserved()
    report = pipe.turbo_report()
    print(report)
    assert reserved <= gib * 2**30
    assert report.exact
    assert "enable_denoiser_slicing" in [step.action for step in report.plan.steps]
    notes = [note for lever in report.levers for note in lever.notes]
    assert [note for note in notes if note.startswith("out of memory in")] == []
    pipe.turbo_undo()
