"""The exported UNet on a GPU: the eager picture at other sizes, no second copy of the weights, graphs over it."""

from __future__ import annotations

import re

import pytest
import torch

from diffusers_turbo import turbo
from diffusers_turbo.parity import distance
from tests import tiny

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.timeout(900)]


def test_pictures_memory_and_graphs(tmp_path):
    pipe = turbo(tiny.sd().to("cuda"))
    # weights that memory would show twice
    pipe.unet = tiny.unet(block_out_channels=(320, 640)).to("cuda")
    sizes = ((1, 64, 64), (2, 96, 128))
    stock = [tiny.picture(pipe, batch=batch, height=height, width=width) for batch, height, width in sizes]
    path = pipe.export_unet(tmp_path / "unet.pt2")
    weights = sum(tensor.numel() * tensor.element_size() for tensor in pipe.unet.parameters())
    torch.cuda.synchronize()
    before, free_before = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]
    pipe.load_exported_unet(path)
    taken = []
    for _ in range(2):
        ours = [tiny.picture(pipe, batch=batch, height=height, width=width) for batch, height, width in sizes]
        for picture, wanted in zip(ours, stock, strict=True):
            assert distance(picture, wanted).psnr_db >= 60
        assert torch.cuda.memory_allocated() - before < weights / 4
        taken.append(free_before - torch.cuda.mem_get_info()[0])
        pipe.enable_cuda_graphs()
    report = str(pipe.turbo_report())
    assert "runs eagerly:" not in report
    assert re.search(r"(?i)unet.*: .*[1-9]\d* replays", report)
    with torch.no_grad():
        pipe.unet.conv_out.bias.add_(1)
    assert distance(tiny.picture(pipe, height=64, width=64), stock[0]).psnr_db < 40
    pipe.turbo_undo()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() - before < weights / 4
    assert max(taken) < weights, "outside of torch's allocator, if no other process took it"
