"""The memory fallback beside all else: other errors, graphs, threads, other pipelines, callbacks, copies."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch

from diffusers_turbo import turbo
from diffusers_turbo.actions import cached_memory
from diffusers_turbo.errors import OutOfMemoryError
from diffusers_turbo.graphs.capture import CAPTURES
from diffusers_turbo.parity import distance
from tests import tiny
from tests.actions.starved import MESSAGE, Starved, actions, on, once
from tests.graphs.fake import FakeCapture
from tests.state import differences, state_of

MODEL = ("enable_model_cpu_offload", {})


def test_other_errors_go_through_untouched(monkeypatch):
    pipe = turbo(tiny.sd())
    tiny.picture(pipe)  # a first call sets the pipeline's own attributes
    before = state_of(pipe)
    pipe.enable_memory_fallback()
    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    Starved(lambda: False, error=lambda: error).install(monkeypatch, pipe.unet)
    with pytest.raises(RuntimeError, match="mat1 and mat2") as caught:
        tiny.picture(pipe)
    assert caught.value is error
    assert "out of memory in" not in str(pipe.turbo_report())
    pipe.turbo_undo()
    assert differences(before, state_of(pipe)) == []


def test_an_allocation_that_failed_inside_a_compilers_error_counts(monkeypatch):
    def wrapped() -> Exception:
        try:
            raise RuntimeError("the compiler failed") from torch.OutOfMemoryError(MESSAGE)
        except RuntimeError as error:
            return error

    pipe = turbo(tiny.sd())
    pipe.enable_memory_fallback()
    starved = Starved(once(), error=wrapped).install(monkeypatch, pipe.unet)
    tiny.picture(pipe)
    assert starved.failures == 1


@pytest.mark.parametrize("make", [tiny.sd, tiny.sdxl, tiny.pixart])
def test_what_cannot_go_beside_offload_makes_way_and_comes_back(make, monkeypatch):
    monkeypatch.setitem(CAPTURES, "cpu", FakeCapture)
    FakeCapture.alive = 0
    pipe = turbo(make())
    stock, before = tiny.picture(pipe, steps=4), state_of(pipe)
    pipe.enable_cuda_graphs()
    wanted = ["enable_cuda_graphs"]
    if make is tiny.sd:
        pipe.enable_shared_guidance()
        pipe.enable_prompt_projections()
        pipe.enable_time_projections()
        wanted += ["enable_time_projections", "enable_prompt_projections", "enable_shared_guidance"]
    eager = tiny.picture(pipe, steps=4)
    pipe.enable_memory_fallback()
    starved = Starved(on(pipe, MODEL[0])).install(monkeypatch, pipe.vae.decoder)
    pipe.vae.decoder.register_buffer("changed", torch.zeros(1))  # drops the decoder's graph, so that it runs
    ours = tiny.picture(pipe, steps=4)
    assert distance(ours, eager).psnr_db >= 90
    assert starved.failures == 4  # one of them was a recording's
    assert FakeCapture.alive == 0
    assert sorted(actions(pipe)) == ["enable_memory_fallback", "enable_model_cpu_offload"]
    assert "enable_cuda_graphs() off" in str(pipe.turbo_report())
    assert torch.equal(tiny.picture(pipe, steps=4), stock)
    pipe.disable_memory_fallback()
    assert sorted(actions(pipe)) == sorted(wanted)
    del pipe.vae.decoder.changed
    pipe.turbo_undo()
    assert differences(before, state_of(pipe)) == []


def test_a_replay_that_fails_in_the_third_step(monkeypatch):
    monkeypatch.setitem(CAPTURES, "cpu", FakeCapture)
    pipe = turbo(tiny.sd())
    stock = tiny.picture(pipe, steps=4)
    pipe.enable_cuda_graphs()
    pipe.enable_memory_fallback()
    replay, room = FakeCapture.replay, once(2)

    def starved(capture: FakeCapture) -> None:
        recorded = pipe.unet._compiled_call_impl.inner.graphs.values()
        if any(graph.capture is capture for graph in recorded) and not room():
            raise torch.OutOfMemoryError(MESSAGE)
        replay(capture)

    monkeypatch.setattr(FakeCapture, "replay", starved)
    assert torch.equal(tiny.picture(pipe, steps=4), stock)
    assert actions(pipe) == ["enable_memory_fallback"]
    assert "unet, call 2 on [2, 4, 8, 8], [2, 16, 32]: enable_cuda_graphs() off" in str(pipe.turbo_report())


@pytest.mark.parametrize("copy_on", [False, True])
def test_a_vae_in_float32_for_its_decode_is_cast_back(copy_on, monkeypatch):
    """Model offload is put on in the middle of SDXL's cast; and when nothing helps, the cast is undone as well."""
    pipe = turbo(tiny.sdxl())
    for module in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
        module.to(torch.float16)
    stock, before = tiny.picture(pipe), state_of(pipe)
    if copy_on:
        pipe.enable_vae_upcast_copy()
    pipe.enable_memory_fallback()
    starved = Starved(on(pipe, *MODEL[:1])).install(monkeypatch, pipe.vae.decoder)
    assert torch.equal(tiny.picture(pipe), stock)
    assert pipe.vae.dtype == torch.float16
    starved.room = lambda: False
    with pytest.raises(OutOfMemoryError, match="vae.decode"):
        tiny.picture(pipe)
    starved.room = lambda: True
    assert pipe.vae.dtype == torch.float16
    assert torch.equal(tiny.picture(pipe), stock)
    pipe.turbo_undo()
    assert differences(before, state_of(pipe)) == []


def test_threads_share_a_pipeline_and_weights_stay_where_another_works(monkeypatch):
    """Two calls at once: the one that starves may free and slice, and not move what the other computes with."""
    pipe = turbo(tiny.sd())
    before = state_of(pipe)
    pipe.enable_memory_fallback()
    inside, go_on = threading.Event(), threading.Event()
    found: list[BaseException] = []

    def wait(*_: Any) -> dict[str, Any]:
        inside.set()
        go_on.wait(20)
        return {}

    other = threading.Thread(target=lambda: tiny.picture(pipe, steps=1, callback_on_step_end=wait))
    other.start()
    inside.wait(20)
    with monkeypatch.context() as patch:
        Starved(lambda: False).install(patch, pipe.text_encoder)
        try:
            tiny.picture(pipe, steps=1)
        except OutOfMemoryError as error:
            found.append(error)
    go_on.set()
    other.join()
    assert len(found) == 1
    assert actions(pipe) == ["enable_memory_fallback"]
    pipe.disable_memory_fallback()
    assert "decode" not in vars(pipe.vae)
    assert [line for line in differences(before, state_of(pipe)) if not line.startswith("pipe:")] == []


def test_two_pipelines_over_the_same_components_leave_them_as_they_were(monkeypatch):
    pipe = turbo(tiny.sd())
    twin = turbo(type(pipe).__bases__[-1](**pipe.components, requires_safety_checker=False))
    twin.set_progress_bar_config(disable=True)
    tiny.picture(twin)
    stock, before = tiny.picture(pipe), state_of(pipe)
    pipe.enable_memory_fallback()
    twin.enable_memory_fallback()
    inner: list[torch.Tensor] = []

    def call_the_twin(*_: Any) -> dict[str, Any]:
        if not inner:
            scheduler = copy.deepcopy(pipe.scheduler)
            inner.append(tiny.picture(twin))
            pipe.scheduler.__dict__.update(scheduler.__dict__)
        return {}

    assert torch.equal(tiny.picture(pipe, callback_on_step_end=call_the_twin), stock)
    pipe.turbo_undo()
    twin.turbo_undo()
    assert differences(before, state_of(pipe)) == []


@pytest.mark.parametrize("switch", ["enable_cuda_graphs", "enable_prompt_projections", "compile_unet", "turbo_undo"])
def test_a_callback_may_throw_switches_in_the_middle_of_a_call(switch, monkeypatch):
    monkeypatch.setitem(CAPTURES, "cpu", FakeCapture)
    pipe = turbo(tiny.sd())
    stock, before = tiny.picture(pipe), state_of(pipe)
    pipe.enable_memory_fallback()
    thrown: list[str] = []

    def throw(*_: Any) -> dict[str, Any]:
        if not thrown:
            thrown.append(switch)
            getattr(pipe, switch)(**({"backend": "eager"} if switch == "compile_unet" else {}))
        return {}

    assert distance(tiny.picture(pipe, callback_on_step_end=throw), stock).psnr_db >= 90
    assert distance(tiny.picture(pipe), stock).psnr_db >= 90
    pipe.turbo_undo()
    assert differences(before, state_of(pipe)) == []


def test_steps_go_along_with_a_copy(monkeypatch):
    pipe = turbo(tiny.sd())
    stock = tiny.picture(pipe)
    pipe.enable_memory_fallback()
    with monkeypatch.context() as patch:
        Starved(on(pipe, *MODEL[:1])).install(patch, pipe.unet)
        tiny.picture(pipe)
    twin = copy.deepcopy(pipe)
    assert actions(twin) == actions(pipe)
    assert distance(tiny.picture(twin), stock).psnr_db > 100
    pipe.disable_memory_fallback()
    assert {"enable_denoiser_slicing", "enable_model_cpu_offload"} <= set(actions(twin))


@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_the_room_on_a_device_that_is_named_without_its_number(name, monkeypatch):
    """torch tells a process's share of a device only by its number."""

    def fraction(device):
        if not isinstance(device, int):
            raise ValueError(f"Expected a torch.device with a specified index or an integer, but got:{device}")
        return 0.5 if device == 1 else 0.25

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (900, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 50)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", fraction, raising=False)
    assert cached_memory.usable_bytes(torch.device(name)) == (500 if name == "cuda:1" else 250)
