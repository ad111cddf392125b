"""CUDA graphs on a GPU: the eager picture, memory that comes back, full size."""

from __future__ import annotations

import pytest
import torch

from diffusers_turbo import turbo
from diffusers_turbo.parity import distance
from tests import full_size, tiny
from tests.state import differences, state_of

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]


def equal_or_near(ours: torch.Tensor, stock: torch.Tensor, repeatable: bool) -> bool:
    """Equal bits where stock repeats itself to the bit, else rounding."""
    return torch.equal(ours, stock) if repeatable else distance(ours, stock).psnr_db >= 60


@pytest.mark.parametrize("make", [tiny.sd, tiny.sdxl, tiny.pixart])
def test_tiny_pipelines_and_undo(make):
    pipe = turbo(make().to("cuda"))
    stock = tiny.picture(pipe, steps=4)
    repeatable = torch.equal(tiny.picture(pipe, steps=4), stock)
    before = state_of(pipe)
    pipe.enable_cuda_graphs()
    for _ in range(3):
        assert equal_or_near(tiny.picture(pipe, steps=4), stock, repeatable)
    told = str(pipe.turbo_report())
    assert "1 captured, 1 kept" in told
    assert "could not be captured" not in told, told
    assert "runs eagerly:" not in told, told
    assert pipe.turbo_undo().left_alone == ()
    assert differences(before, state_of(pipe)) == []
    assert equal_or_near(tiny.picture(pipe, steps=4), stock, repeatable)


def test_ten_sizes_fifty_calls_three_graphs_and_memory_is_flat():
    pipe = turbo(tiny.sd().to("cuda"))
    pipe.enable_cuda_graphs(max_graphs=3)
    sizes = [(64 + 32 * (index % 5), 64 + 32 * (index // 5)) for index in range(10)]
    reserved = []
    for _ in range(5):
        for height, width in sizes:
            assert torch.isfinite(tiny.picture(pipe, steps=4, height=height, width=width)).all()
            assert len(pipe.unet._compiled_call_impl.graphs) <= 3
        torch.cuda.synchronize()
        reserved.append(torch.cuda.memory_reserved())
    print([f"{value / 2**20:.0f} MiB" for value in reserved])
    assert max(reserved[2:]) <= reserved[1]
    before = torch.cuda.memory_reserved()
    pipe.turbo_undo()
    assert torch.cuda.memory_reserved() <= before


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
@pytest.mark.parametrize("layout", [False, True], ids=["plain", "channels_last"])
def test_full_size(name, layout):
    pipe = turbo(full_size.build(name))
    if layout:
        pipe.enable_channels_last()
    latents = torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(0)).to("cuda", torch.float16)

    def picture() -> torch.Tensor:
        made = pipe("a red cat", height=512, width=512, latents=latents, num_inference_steps=4, output_type="pt")
        return made.images.float().cpu()

    stock = picture()
    repeatable = torch.equal(picture(), stock)
    pipe.enable_cuda_graphs()
    for _ in range(3):
        ours = picture()
        assert equal_or_near(ours, stock, repeatable), distance(ours, stock)
    told = str(pipe.turbo_report())
    print(told)
    assert "UNet2DConditionModel: 1 captured" in told
    pipe.turbo_undo()
    torch.cuda.empty_cache()
