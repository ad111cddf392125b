"""Memory that runs out in a call: the right picture by the steps promised, or one clear error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline

from diffusers_turbo import TurboError, turbo
from diffusers_turbo.actions.ledger import open_ledger
from diffusers_turbo.actions.offload import Placement, TensorPlace
from diffusers_turbo.actions.tiled_calls import TiledDecode
from diffusers_turbo.errors import OutOfMemoryError
from diffusers_turbo.parity import distance
from diffusers_turbo.planning.options import VAEExactTiling, VAETiling
from tests import tiny
from tests.actions.starved import MESSAGE, Starved, actions, offload, on, once, part
from tests.state import differences, state_of

GIVEN = ("nothing", "model", "block")
LEAF = ("enable_group_offload", {"offload_type": "leaf_level"})
STAGES = [
    *((tiny.sd, stage, at, given) for given in GIVEN for stage, at in [("text_encoder", 1), ("denoiser", 3)]),
    (tiny.sd, "denoiser", 1, "nothing"),
    *((tiny.sdxl, "decode", 1, given) for given in GIVEN),
    (tiny.sdxl, "text_encoder_2", 1, "nothing"),
    (tiny.sdxl, "denoiser", 3, "model"),
    (tiny.pixart, "denoiser", 3, "nothing"),
    (tiny.pixart, "decode", 1, "block"),
]


def same(ours: torch.Tensor, stock: torch.Tensor, stage: str) -> bool:
    """Whether two pictures have the same bits; a slice of the denoiser's batch is rounded otherwise than the whole."""
    return distance(ours, stock).psnr_db > 100 if stage == "denoiser" else torch.equal(ours, stock)


@pytest.mark.parametrize(("make", "stage", "at", "given"), STAGES)
def test_each_stage_gets_its_picture_by_offload(make, stage, at, given, monkeypatch):
    pipe = turbo(make())
    stock, before = tiny.picture(pipe, steps=3), state_of(pipe)
    starved = Starved(on(pipe, LEAF[0], **LEAF[1]), at=at).install(monkeypatch, part(pipe, stage))
    offload(pipe, given)
    offloaded = actions(pipe)
    pipe.enable_memory_fallback()
    assert same(tiny.picture(pipe, steps=3), stock, stage)
    # freed, the denoiser's batch in slices, then each offload above the one there was
    assert starved.failures == {"nothing": 4, "model": 3, "block": 2}[given] + (stage == "denoiser")
    assert True not in starved.pinned
    told = str(pipe.turbo_report())
    assert told.count("out of memory in ") == starved.failures
    assert f"call {at if stage == 'denoiser' else 1} on [" in told
    assert pipe.turbo_report().exact
    # remembered
    starved.calls, failures = 0, starved.failures
    assert same(tiny.picture(pipe, steps=3), stock, stage)
    assert starved.failures == failures
    pipe.disable_memory_fallback()
    assert actions(pipe) == offloaded
    assert pipe.turbo_undo().left_alone == ()
    assert differences(before, state_of(pipe)) == []


@pytest.mark.parametrize("stage", ["text_encoder", "denoiser", "decode"])
def test_an_error_that_freeing_mends_switches_nothing_on(stage, monkeypatch):
    pipe = turbo(tiny.sd())
    stock, before = tiny.picture(pipe), state_of(pipe)
    pipe.enable_memory_fallback()
    Starved(once()).install(monkeypatch, part(pipe, stage))
    assert torch.equal(tiny.picture(pipe), stock)
    assert actions(pipe) == ["enable_memory_fallback"]
    assert "freed what was cached" in str(pipe.turbo_report())
    pipe.disable_memory_fallback()
    assert differences(before, state_of(pipe)) == []


@pytest.mark.parametrize("make", [tiny.sd, tiny.sdxl])
def test_a_batch_is_decoded_one_by_one_first(make, monkeypatch):
    pipe = turbo(make())
    stock, before = tiny.picture(pipe, batch=2), state_of(pipe)
    pipe.enable_memory_fallback()
    starved = Starved(lambda: pipe.vae.use_slicing).install(monkeypatch, pipe.vae.decoder)
    assert distance(tiny.picture(pipe, batch=2), stock).psnr_db >= 90
    assert starved.failures == 2
    assert sorted(actions(pipe)) == ["enable_memory_fallback", "enable_vae_slicing"]
    assert "vae.decode, call 1 on [2, 4, 8, 8]: enable_vae_slicing()" in str(pipe.turbo_report())
    pipe.turbo_undo()
    assert differences(before, state_of(pipe)) == []


def test_a_picture_to_start_from_is_encoded_with_the_same_noise(monkeypatch):
    pipe = turbo(StableDiffusionImg2ImgPipeline(**tiny.sd().components, requires_safety_checker=False))
    pipe.set_progress_bar_config(disable=True)

    def picture() -> torch.Tensor:
        image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
        generator = torch.Generator().manual_seed(0)
        arguments = {"prompt": "red cat", "image": image, "generator": generator, "output_type": "pt"}
        return pipe(**arguments, num_inference_steps=4).images

    stock, before = picture(), state_of(pipe)
    pipe.enable_memory_fallback()
    Starved(on(pipe, *LEAF[:1])).install(monkeypatch, pipe.vae.encoder)
    assert torch.equal(picture(), stock)
    assert "vae.encode, call 1 on [1, 3, 64, 64]" in str(pipe.turbo_report())
    pipe.turbo_undo()
    assert differences(before, state_of(pipe)) == []


def test_attention_that_holds_its_scores_is_sliced_before_anything_is_moved(monkeypatch):
    pipe = turbo(tiny.sd())
    pipe.enable_naive_attention()
    stock = tiny.picture(pipe)
    pipe.enable_memory_fallback()
    Starved(on(pipe, "enable_attention_slicing")).install(monkeypatch, pipe.unet)
    assert distance(tiny.picture(pipe), stock).psnr_db >= 90
    assert "enable_attention_slicing(slice_size='max')" in str(pipe.turbo_report())
    assert not any("offload" in action for action in actions(pipe))
    pipe.disable_memory_fallback()
    assert actions(pipe) == ["enable_naive_attention"]


@pytest.mark.parametrize("make", [tiny.sd, tiny.sdxl])
def test_tiles_come_last_and_are_called_lossy(make, monkeypatch):
    pipe = turbo(make())
    pipe.enable_memory_fallback(allow_tiling=True)
    lossy = lambda: isinstance(getattr(pipe.vae, "tiled_decode", None), TiledDecode)  # noqa: E731
    starved = Starved(lossy).install(monkeypatch, pipe.vae.decoder.conv_in)
    ours = tiny.picture(pipe, steps=1, height=264, width=264)
    assert torch.isfinite(ours).all()
    # as it was, after freeing, in three kinds of exact tiles, by model offload, and layer by layer
    assert starved.failures == 7
    report = pipe.turbo_report()
    assert "enable_vae_exact_tiling()" in str(report)
    assert "by_layers=('vae',)" in str(report)
    assert not report.exact
    assert f"enable_vae_tiling(tile_size=256); LOSSY: {VAETiling().lossy_reason}" in str(report)


@pytest.mark.parametrize("make", [tiny.sd, tiny.sdxl])
def test_exact_tiles_come_before_offload(make, monkeypatch):
    size = {"steps": 1, "height": 264, "width": 264}
    stock = tiny.picture(make(), **size)
    pipe = turbo(make())
    pipe.enable_memory_fallback()
    starved = Starved(lambda: False).install(monkeypatch, pipe.vae.decoder)
    for _ in range(2):
        assert distance(tiny.picture(pipe, **size), stock).psnr_db > 100
    assert starved.failures == 2  # as it was, and with what was cached given back
    assert actions(pipe) == ["enable_memory_fallback", "enable_vae_exact_tiling"]
    assert pipe.turbo_report().exact
    pipe.disable_memory_fallback()
    assert actions(pipe) == []


@pytest.mark.parametrize("wanted", [{"hold_on": "host"}, {"tile_size": 128, "hold_on": "host"}])
@pytest.mark.parametrize("already", [None, {}, {"tile_size": 512}])
def test_exact_tiles_come_to_hold_less(already, wanted, monkeypatch):
    size = {"steps": 1, "height": 264, "width": 264}
    pipe = turbo(tiny.sd())
    stock = tiny.picture(pipe, **size)
    own = pipe.vae.tile_sample_min_size
    if already is not None:
        pipe.enable_vae_exact_tiling(**already)
    before = on_now(pipe)
    pipe.enable_memory_fallback()
    step = VAEExactTiling(**wanted)
    Starved(lambda: step in on_now(pipe)).install(monkeypatch, pipe.vae.decoder.conv_in)
    for _ in range(2):
        assert distance(tiny.picture(pipe, **size), stock).psnr_db > 100
    assert step in on_now(pipe)
    assert pipe.turbo_report().exact
    pipe.disable_memory_fallback()
    assert on_now(pipe) == before
    assert pipe.vae.tile_sample_min_size == (already or {}).get("tile_size", 256 if already is not None else own)


def on_now(pipe):
    return [lever.options for lever in open_ledger(pipe).in_force()]


@pytest.mark.parametrize("make", [tiny.sd, tiny.sdxl])
def test_tiles_that_are_there_become_smaller(make, monkeypatch):
    pipe = turbo(make())
    pipe.enable_vae_tiling(tile_size=512)
    pipe.enable_partial_offload(resident_bytes=0, device="cpu")
    pipe.enable_memory_fallback(allow_tiling=True)
    Starved(lambda: pipe.vae.tile_sample_min_size == 256).install(monkeypatch, pipe.vae.decoder)
    for _ in range(2):
        assert torch.isfinite(tiny.picture(pipe, steps=1, height=520, width=520)).all()
        assert pipe.vae.tile_sample_min_size == 256
    pipe.turbo_undo()
    assert not pipe.vae.use_tiling


@pytest.mark.parametrize(("make", "stage", "at", "given"), [*STAGES[:6:2], *STAGES[7:10], STAGES[12]])
def test_when_nothing_is_left_one_error_says_so(make, stage, at, given, monkeypatch):
    pipe = turbo(make())
    stock, before = tiny.picture(pipe, steps=3), state_of(pipe)
    starved = Starved(lambda: False, at=at).install(monkeypatch, part(pipe, stage))
    offload(pipe, given)
    pipe.enable_memory_fallback()
    found = rf"call {at if stage == 'denoiser' else 1} on \[.*memory exhausted"
    with pytest.raises(OutOfMemoryError, match=found) as caught:
        tiny.picture(pipe, steps=3)
    starved.room = lambda: True
    assert isinstance(caught.value, TurboError)
    assert isinstance(caught.value, torch.OutOfMemoryError)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None
    text = str(caught.value)
    assert "after these steps: freed what was cached; " in text
    assert "Tried to allocate 2.00 GiB" in text
    assert "What to do: " in text
    assert starved.failures == {"nothing": 5, "model": 4, "block": 3}[given] + (stage == "denoiser")
    # nothing stays half-offloaded or cast, and the next picture is right
    assert same(tiny.picture(pipe, steps=3), stock, stage)
    pipe.turbo_undo()
    assert differences(before, state_of(pipe)) == []


def test_between_the_components_one_error_and_nothing_is_left_behind(monkeypatch):
    pipe = turbo(tiny.sd())
    stock, before = tiny.picture(pipe, steps=3), state_of(pipe)
    pipe.enable_memory_fallback()
    step, calls = type(pipe.scheduler).step, []

    def starved(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError(MESSAGE)
        return step(*args, **kwargs)

    monkeypatch.setattr(type(pipe.scheduler), "step", starved)
    found = r"own work between its components \(calls so far: 2 of text_encoder, 2 of unet\).*memory exhausted"
    with pytest.raises(OutOfMemoryError, match=found):
        tiny.picture(pipe, steps=3)
    assert torch.equal(tiny.picture(pipe, steps=3), stock)
    pipe.turbo_undo()
    assert differences(before, state_of(pipe)) == []


def test_offload_takes_over_from_offload_in_host_memory(monkeypatch):
    """Bringing the weights back to the device in between would need the room that is missing."""
    pipe = turbo(tiny.sd())
    starved = Starved(on(pipe, LEAF[0], **LEAF[1])).install(monkeypatch, pipe.unet)
    pipe.enable_model_cpu_offload(device="cpu")
    pipe.enable_memory_fallback()
    (placement,) = [c for c in pipe._turbo_ledger.top("offload").journal.changes if isinstance(c, Placement)]
    there = torch.device("cpu", 0)  # stands for the GPU that the weights came from
    for place in placement.tensors:
        place.device = there
    targets: list[torch.device | None] = []
    restore = TensorPlace.restore

    def noted(place: TensorPlace, device: torch.device | None = None) -> None:
        targets.append(device or place.device)
        restore(place, device)

    monkeypatch.setattr(TensorPlace, "restore", noted)
    tiny.picture(pipe, steps=1)
    assert starved.failures == 4
    assert targets
    assert there not in targets
    targets.clear()
    pipe.turbo_undo()
    assert set(targets) == {there}


def test_what_a_failed_call_drew_from_its_generator_is_drawn_again(monkeypatch):
    pipe = turbo(tiny.sd())
    pipe.enable_memory_fallback()
    drawn: list[torch.Tensor] = []
    decode, room = type(pipe.vae).decode, once(2)

    def draws(vae: Any, *args: Any, generator: torch.Generator, **kwargs: Any) -> Any:
        drawn.append(torch.randn(3, generator=generator))
        if not room():
            raise torch.OutOfMemoryError(MESSAGE)
        return decode(vae, *args, **kwargs)

    monkeypatch.setattr(type(pipe.vae), "decode", draws)
    tiny.picture(pipe, generator=torch.Generator().manual_seed(3))
    assert len(drawn) == 3
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])


def test_a_step_that_cannot_be_taken_is_passed_over_and_named(monkeypatch):
    pipe = turbo(tiny.sd())
    stock = tiny.picture(pipe)
    starved = Starved(on(pipe, LEAF[0], **LEAF[1])).install(monkeypatch, pipe.unet)
    pipe.enable_memory_fallback()

    def no_pinned_memory(*_: Any, **__: Any) -> None:
        raise RuntimeError("cudaHostAlloc failed")

    monkeypatch.setattr(type(pipe).__bases__[-1], "enable_model_cpu_offload", no_pinned_memory)
    assert torch.equal(tiny.picture(pipe), stock)
    starved.room = lambda: False
    with pytest.raises(OutOfMemoryError, match=r"enable_model_cpu_offload.* was refused \(.*cudaHostAlloc failed"):
        tiny.picture(pipe)
