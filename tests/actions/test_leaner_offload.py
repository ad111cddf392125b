"""Memory that runs out under partial offload: less of the same, by which exact tiles stay what they are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diffusers_turbo import turbo
from diffusers_turbo.actions.ledger import ledger_of
from diffusers_turbo.actions.streaming import weights_of
from diffusers_turbo.actions.tiled_calls import ExactDecode
from diffusers_turbo.errors import OutOfMemoryError
from diffusers_turbo.parity import distance
from diffusers_turbo.planning.options import PartialOffload
from tests import tiny
from tests.actions.starved import MESSAGE, Starved, part
from tests.actions.streamed import EVERYTHING, Device, residency_of
from tests.state import differences, state_of

LARGE = {"steps": 3, "height": 264, "width": 264}
"""Larger than a tile."""


def offload_of(pipe) -> PartialOffload | None:
    """Return the partial offload in force."""
    lever = ledger_of(pipe).top("offload")
    return lever.options if lever is not None and isinstance(lever.options, PartialOffload) else None


def offloads_told(pipe) -> list[str]:
    return [line for line in str(pipe.turbo_report()).splitlines() if "out of memory in" in line and "offload(" in line]


def whole(pipe) -> int:
    return sum(weight.nbytes for weight in weights_of(pipe.unet))


GIVEN = {
    "nothing": lambda pipe: None,
    "model": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "all of it": lambda pipe: pipe.enable_partial_offload("all", device="cpu"),
    "half of it": lambda pipe: pipe.enable_partial_offload(whole(pipe) // 2, by_layers="vae", device="cpu"),
}


@pytest.mark.parametrize("given", GIVEN)
def test_less_of_the_denoiser_stays_until_it_has_room_and_tiles_stay_exact(given, monkeypatch):
    pipe = turbo(tiny.sd())
    stock, before = tiny.picture(pipe, **LARGE), state_of(pipe)

    def room() -> bool:
        now = offload_of(pipe)
        return now is not None and now.stays(whole(pipe)) <= whole(pipe) // 4

    Starved(room, at=2).install(monkeypatch, pipe.unet)
    pipe.enable_vae_exact_tiling()
    GIVEN[given](pipe)
    partial = offload_of(pipe)
    pipe.enable_memory_fallback()
    for _ in range(2):
        assert distance(tiny.picture(pipe, **LARGE), stock).psnr_db > 100
    assert offload_of(pipe).resident_bytes == whole(pipe) // 4, "as much stays as has room, by halves"
    assert offload_of(pipe).prefetch
    assert offload_of(pipe).alone == (partial.alone if partial is not None else ())
    assert not any("group_offload" in line or "sequential" in line for line in offloads_told(pipe))
    assert isinstance(pipe.vae.tiled_decode, ExactDecode)
    assert not pipe.vae.tiled_decode.alone, "the last decode was in tiles"
    assert pipe.turbo_report().exact
    pipe.disable_memory_fallback()
    assert offload_of(pipe) == partial
    pipe.turbo_undo()
    assert differences(before, state_of(pipe)) == []


def test_each_step_keeps_less_until_none_is_left(monkeypatch):
    pipe = turbo(tiny.sd())
    stock = tiny.picture(pipe, steps=3)
    tried: list[PartialOffload] = []

    def room() -> bool:
        tried.append(offload_of(pipe))
        return False

    starved = Starved(room, at=2).install(monkeypatch, pipe.unet)
    pipe.enable_vae_exact_tiling()
    pipe.enable_partial_offload(EVERYTHING, denoiser_leaves=True, device="cpu")
    pipe.enable_memory_fallback()
    with pytest.raises(OutOfMemoryError, match="prefetch=False"):
        tiny.picture(pipe, steps=3)
    # as it was, again with what was cached given back, in slices of the batch, then by halves
    assert [offload.resident_bytes for offload in tried[3:]] == [*(whole(pipe) // part for part in (2, 4, 8)), 0, 0]
    assert [offload.prefetch for offload in tried[3:]] == [True] * 4 + [False]
    starved.room = lambda: True
    assert distance(tiny.picture(pipe, steps=3), stock).psnr_db > 100


@pytest.mark.parametrize("stage", ["text_encoder", "decode"])
def test_what_comes_beside_the_denoiser_comes_layer_by_layer(stage, monkeypatch):
    pipe = turbo(tiny.sd())
    stock, before = tiny.picture(pipe), state_of(pipe)
    name = {"decode": "vae"}.get(stage, stage)
    Starved(lambda: name in offload_of(pipe).alone).install(monkeypatch, part(pipe, stage))
    pipe.enable_partial_offload(500_000, device="cpu")
    pipe.enable_memory_fallback()
    for _ in range(2):
        assert torch.equal(tiny.picture(pipe), stock)
    told = offloads_told(pipe)
    assert len(told) == 2
    assert "denoiser_leaves=True" in told[0], "the denoiser makes room first"
    assert f"by_layers=('{name}',)" in told[1]
    assert pipe.turbo_report().exact
    pipe.disable_memory_fallback()
    assert offload_of(pipe) == PartialOffload(resident_bytes=500_000, device="cpu")
    pipe.turbo_undo()
    assert differences(before, state_of(pipe)) == []


def test_the_layer_in_which_it_ran_out_goes_home_before_the_next_attempt(monkeypatch):
    """Of an SDXL's VAE, whose hooks stay as they are while it is cast to float32."""
    Device(monkeypatch)
    pipe = turbo(tiny.sdxl())
    pipe.vae = tiny.vae(block_out_channels=(64,) * 4, force_upcast=True)  # of layers that come alone
    pipe.to(torch.float16)
    pipe.enable_partial_offload(0, by_layers="vae", device="cpu")
    pipe.enable_memory_fallback()
    tiny.picture(pipe)
    conv = pipe.vae.decoder.up_blocks[-1].resnets[-1].conv1
    there: list[list[nn.Module]] = []
    pipe.vae.post_quant_conv.register_forward_pre_hook(
        lambda *_: there.append([unit.module for unit in residency_of(pipe)._alone])
    )
    works = conv._conv_forward

    def fails_once(*arguments):
        assert [unit.module for unit in residency_of(pipe)._alone] == [conv]
        if len(there) == 1:
            raise torch.OutOfMemoryError(MESSAGE)
        return works(*arguments)

    monkeypatch.setattr(conv, "_conv_forward", fails_once)
    tiny.picture(pipe)
    assert there == [[], []]
    assert residency_of(pipe)._alone == {}
    assert "freed what was cached" in str(pipe.turbo_report())
