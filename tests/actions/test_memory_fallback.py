"""Memory that runs out in a call: the right picture by the steps promised, or one clear error, and the way back."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from torch import nn

from diffusers_turbo import TurboError, turbo
from diffusers_turbo.actions.offload import Placement, TensorPlace
from diffusers_turbo.errors import OutOfMemoryError
from diffusers_turbo.graphs.capture import CAPTURES
from diffusers_turbo.parity import distance
from diffusers_turbo.planning.options import VAETiling
from tests import tiny
from tests.graphs.fake import FakeCapture
from tests.state import differences, state_of

Pipe = Any
MESSAGE = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1.00 GiB"


@pytest.fixture(autouse=True)
def _quick_collections():
    """Let the collections of garbage, one a step, pass over what was imported before."""
    gc.freeze()
    yield
    gc.unfreeze()


@dataclass
class Starved:
    """A module whose call runs out of memory, from its call `at` on, until there is room."""

    room: Callable[[], bool]
    at: int = 1
    error: Callable[[], Exception] = lambda: torch.OutOfMemoryError(MESSAGE)
    calls: int = 0
    failures: int = 0
    activations: list[weakref.ref] = field(default_factory=list)
    pinned: list[bool] = field(default_factory=list)
    kept: list[Exception] = field(default_factory=list)

    def install(self, monkeypatch: pytest.MonkeyPatch, module: nn.Module) -> Starved:
        """Stand in for this module's forward; before any offload, whose hooks keep the forward that they find."""
        forward = type(module).forward

        def starved(this: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if this is not module:
                return forward(this, *args, **kwargs)
            self.calls += 1
            self.pinned += [ref() is not None for ref in self.activations]
            if self.calls < self.at or self.room():
                return forward(this, *args, **kwargs)
            self.failures += 1
            activation = torch.zeros(64, 64)
            self.activations.append(weakref.ref(activation))
            self.kept.append(self.error())  # as a debugger or a log may hold it
            raise self.kept[-1]

        monkeypatch.setattr(type(module), "forward", starved)
        return self


def once(failures: int = 1) -> Callable[[], bool]:
    """Room after so many failures."""
    left = [failures]

    def room() -> bool:
        left[0] -= 1
        return left[0] < 0

    return room


def on(pipe: Pipe, action: str, **options: Any) -> Callable[[], bool]:
    """Room once this switch is in force."""

    def room() -> bool:
        levers = [lever for lever in pipe.turbo_report().levers if lever.in_force and lever.action == action]
        return any(options.items() <= lever.options.items() for lever in levers)

    return room


def part(pipe: Pipe, stage: str) -> nn.Module:
    if stage == "denoiser":
        return pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    return {"decode": pipe.vae.decoder, "encode": pipe.vae.encoder}.get(stage) or getattr(pipe, stage)


def actions(pipe: Pipe) -> list[str]:
    return [lever.action for lever in pipe.turbo_report().levers if lever.in_force]


def offload(pipe: Pipe, given: str) -> None:
    """Switch on what the user had on already."""
    if given == "model":
        pipe.enable_model_cpu_offload(device="cpu")
    elif given == "block":
        pipe.enable_group_offload("cpu")


GIVEN = ("nothing", "model", "block")
LEAF = ("enable_group_offload", {"offload_type": "leaf_level"})
MODEL = ("enable_model_cpu_offload", {})
STAGES = [
    *((tiny.sd, stage, at, given) for given in GIVEN for stage, at in [("text_encoder", 1), ("denoiser", 3)]),
    (tiny.sd, "denoiser", 1, "nothing"),
    *((tiny.sdxl, "decode", 1, given) for given in GIVEN),
    (tiny.sdxl, "text_encoder_2", 1, "nothing"),
    (tiny.sdxl, "denoiser", 3, "model"),
    (tiny.pixart, "denoiser", 3, "nothing"),
    (tiny.pixart, "decode", 1, "block"),
]


@pytest.mark.parametrize(("make", "stage", "at", "given"), STAGES)
def test_each_stage_gets_its_picture_by_offload(make, stage, at, given, monkeypatch):
    pipe = turbo(make())
    stock, before = tiny.picture(pipe, steps=3), state_of(pipe)
    starved = Starved(on(pipe, LEAF[0], **LEAF[1]), at=at).install(monkeypatch, part(pipe, stage))
    offload(pipe, given)
    offloaded = actions(pipe)
    pipe.enable_memory_fallback()
    assert torch.equal(tiny.picture(pipe, steps=3), stock)
    # freed, then each offload above the one there was
    assert starved.failures == {"nothing": 4, "model": 3, "block": 2}[given]
    assert True not in starved.pinned
    told = str(pipe.turbo_report())
    assert told.count("out of memory in ") == starved.failures
    assert f"call {at if stage == 'denoiser' else 1} on [" in told
    assert pipe.turbo_report().exact
    # remembered
    starved.calls, failures = 0, starved.failures
    assert torch.equal(tiny.picture(pipe, steps=3), stock)
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
    starved = Starved(lambda: pipe.vae.use_tiling).install(monkeypatch, pipe.vae.decoder)
    ours = tiny.picture(pipe, steps=1, height=264, width=264)
    assert torch.isfinite(ours).all()
    assert starved.failures == 5
    report = pipe.turbo_report()
    assert not report.exact
    assert f"enable_vae_tiling(tile_size=256); LOSSY: {VAETiling().lossy_reason}" in str(report)


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
    assert starved.failures == {"nothing": 5, "model": 4, "block": 3}[given]
    # nothing stays half-offloaded or cast, and the next picture is right
    assert torch.equal(tiny.picture(pipe, steps=3), stock)
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
    assert starved.failures == 3
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
    assert torch.equal(tiny.picture(twin), stock)
    pipe.disable_memory_fallback()
    assert "enable_model_cpu_offload" in actions(twin)
