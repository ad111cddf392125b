"""All that makes the instant tier, together: the same picture, each switch off alone, everything off to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from diffusers_turbo import turbo
from diffusers_turbo.parity import distance
from tests import tiny
from tests.fused.on_cpu import plain_kernels
from tests.state import differences, state_of

SWITCHES = {
    "enable_channels_last": "disable_channels_last",
    "enable_fused_kernels": "disable_fused_kernels",
    "enable_pointwise_matmul": "disable_pointwise_matmul",
    "fuse_qkv_projections": "unfuse_qkv_projections",
    "enable_shared_guidance": "disable_shared_guidance",
    "enable_prompt_projections": "disable_prompt_projections",
    "enable_time_projections": "disable_time_projections",
    "enable_sync_free_loop": "disable_sync_free_loop",
    "enable_cuda_graphs": "disable_cuda_graphs",
}


def near(pipe: Any, stock: torch.Tensor) -> bool:
    return distance(tiny.picture(pipe, steps=4, batch=2), stock).psnr_db >= 100


def on_here(switch: str, make: Any) -> bool:
    """SDXL's halves of guidance differ from the first resnet on."""
    return switch != "enable_shared_guidance" or make is tiny.sd


@pytest.mark.parametrize("make", [tiny.sd, tiny.sdxl])
@pytest.mark.parametrize("backwards", [False, True], ids=["forwards", "backwards"])
def test_together_off_one_by_one_and_undone(make, backwards, monkeypatch, captures_on_the_cpu):
    calls = plain_kernels(monkeypatch)
    pipe = turbo(make())
    stock = tiny.picture(pipe, steps=4, batch=2)
    before = state_of(pipe)
    switches = {on: off for on, off in SWITCHES.items() if on_here(on, make)}
    for switch in reversed(switches) if backwards else switches:
        getattr(pipe, switch)()
    assert near(pipe, stock)
    assert near(pipe, stock)
    told = str(pipe.turbo_report())
    assert "not ahead" not in told
    assert "plain PyTorch" not in told
    assert "UNet2DConditionModel: 1 captured, 1 kept, 7 replays" in told
    assert all(calls.values())
    for off in switches.values():
        getattr(pipe, off)()
        assert near(pipe, stock), off
    assert differences(before, state_of(pipe)) == []
    assert torch.equal(tiny.picture(pipe, steps=4, batch=2), stock)


def test_undone_at_once(monkeypatch, captures_on_the_cpu):
    plain_kernels(monkeypatch)
    pipe = turbo(tiny.sd())
    stock, before = tiny.picture(pipe), state_of(pipe)
    for switch in SWITCHES:
        getattr(pipe, switch)()
    tiny.picture(pipe)
    assert pipe.turbo_undo().left_alone == ()
    assert differences(before, state_of(pipe)) == []
    assert torch.equal(tiny.picture(pipe), stock)
