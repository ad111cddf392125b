"""On a GPU: partial offload under a real cap, its peaks, its stream and its page-locked memory."""

from __future__ import annotations

import gc
import time
import weakref
from itertools import pairwise

import pytest
import torch

from diffusers_turbo import auto_optimize, turbo
from diffusers_turbo.actions.ahead import graphs_of
from diffusers_turbo.actions.streaming import Window, extent, weights_of
from diffusers_turbo.parity import distance
from diffusers_turbo.planning.units import MIB
from tests import full_size, tiny
from tests.actions.streamed import residency_of
from tests.state import differences, state_of

pytestmark = pytest.mark.gpu


def peak_bytes(work) -> int:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def recorded(pipe):
    return graphs_of(vars(pipe.unet)["_compiled_call_impl"])


def held_after_pictures(pipe, stock):
    """Draw four pictures as stock's; return the bytes on the device after each."""
    held = []
    for _ in range(4):
        assert distance(tiny.picture(pipe, steps=8), stock).psnr_db > 60
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated())
    return held


@pytest.mark.parametrize("make", [tiny.sd, tiny.sdxl, tiny.pixart], ids=["sd", "sdxl", "pixart"])
@pytest.mark.parametrize(("leaves", "prefetch"), [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("resident_bytes", [0, 300_000, 700_000, 10**9])
def test_pictures_to_the_bit_and_undo(make, resident_bytes, leaves, prefetch):
    """Many steps, so that a copy that came too late or was overwritten too early would show."""
    pipe = turbo(make().to("cuda"))
    stock, before = tiny.picture(pipe, steps=8), state_of(pipe)
    repeatable = torch.equal(tiny.picture(pipe, steps=8), stock)
    pipe.enable_partial_offload(resident_bytes, denoiser_leaves=leaves, prefetch=prefetch)
    for _ in range(3):
        ours = tiny.picture(pipe, steps=8)
        assert torch.equal(ours, stock) if repeatable else distance(ours, stock).psnr_db > 60
    pipe.disable_offload()
    assert differences(before, state_of(pipe)) == []


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
def test_a_slow_copy_is_waited_for(monkeypatch, graphs):
    """The side stream sleeps before each copy, the main stream before it lets go: only the events keep the order.

    Recorded with a step, they keep it in every replay.
    """
    pipe = turbo(tiny.sd().to("cuda"))
    stock = tiny.picture(pipe, steps=4)
    fetched, leave = Window._fetched, Window.leave

    def slow_fetch(self, group):
        with torch.cuda.stream(self.stream):
            torch.cuda._sleep(2_000_000)
        return fetched(self, group)

    def slow_leave(self):
        torch.cuda._sleep(2_000_000)
        leave(self)

    monkeypatch.setattr(Window, "_fetched", slow_fetch)
    monkeypatch.setattr(Window, "leave", slow_leave)
    pipe.enable_partial_offload(300_000)
    if graphs:
        pipe.enable_cuda_graphs()
    for _ in range(2):
        assert distance(tiny.picture(pipe, steps=4), stock).psnr_db > 60
    assert not graphs or recorded(pipe).replayed == 6  # of 8: one step learns, one is seen


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("make", [tiny.sd, tiny.sdxl], ids=["sd", "sdxl"])
def test_components_that_come_layer_by_layer(make, graphs):
    pipe = turbo(make().to("cuda"))
    stock, before = tiny.picture(pipe, steps=8), state_of(pipe)
    names = [name for name in ("text_encoder", "text_encoder_2", "vae") if hasattr(pipe, name)]
    pipe.enable_partial_offload(300_000, denoiser_leaves=True, by_layers=names)
    if graphs:
        pipe.enable_cuda_graphs()
    for _ in range(3):
        assert distance(tiny.picture(pipe, steps=8), stock).psnr_db > 60
        assert not any(weight.is_cuda for name in names for weight in getattr(pipe, name).parameters())
    pipe.turbo_undo()
    assert differences(before, state_of(pipe)) == []


@pytest.mark.parametrize("make", [tiny.sd, tiny.sdxl], ids=["sd", "sdxl"])
@pytest.mark.parametrize(("leaves", "prefetch"), [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("resident_bytes", [0, 300_000, 700_000])
def test_what_is_streamed_is_recorded_with_the_step(make, resident_bytes, leaves, prefetch):
    """The window's copies are part of the graph: every replay reads what host memory holds then."""
    pipe = turbo(make().to("cuda"))
    stock, before = tiny.picture(pipe, steps=8), state_of(pipe)
    pipe.enable_partial_offload(resident_bytes, denoiser_leaves=leaves, prefetch=prefetch)
    pipe.enable_cuda_graphs()
    held = held_after_pictures(pipe, stock)
    graphs = recorded(pipe)
    assert residency_of(pipe).layers.streamed
    assert graphs.reason is None
    # the first step learns the order, the second is seen
    assert (graphs.eager, graphs.captured, graphs.replayed) == (2, 4, 30)
    assert held[1:] == [held[1]] * 3
    pipe.turbo_undo()
    assert differences(before, state_of(pipe)) == []


def test_a_recording_that_fails_half_way_leaves_nothing_in_the_window(monkeypatch):
    """As where a graph finds no memory of its own under a tight cap: its events would wait for what never runs."""
    enter, entered = Window.enter, []

    def failing(self, group):
        if torch.cuda.is_current_stream_capturing():
            entered.append(group)
            if len(entered) % 3 == 0:
                raise torch.OutOfMemoryError("CUDA out of memory")
        enter(self, group)

    monkeypatch.setattr(Window, "enter", failing)
    pipe = turbo(tiny.sd().to("cuda"))
    stock = tiny.picture(pipe, steps=8)
    pipe.enable_partial_offload(300_000)
    pipe.enable_cuda_graphs()
    for _ in range(2):
        assert distance(tiny.picture(pipe, steps=8), stock).psnr_db > 60
    assert (recorded(pipe).captured, recorded(pipe).eager) == (0, 16)
    assert "could not be captured" in str(pipe.turbo_report())


def test_a_replay_copies_what_was_changed_in_host_memory():
    pipe, other = turbo(tiny.sd().to("cuda")), tiny.sd().to("cuda")
    pipe.enable_partial_offload(0)
    pipe.enable_cuda_graphs()
    for _ in range(2):
        tiny.picture(pipe, steps=4)
    for changed in (pipe, other):
        with torch.no_grad():
            for parameter in changed.unet.mid_block.parameters():
                parameter.mul_(0.5)
    assert distance(tiny.picture(pipe, steps=4), tiny.picture(other, steps=4)).psnr_db > 60


def test_streamed_weights_are_page_locked_and_no_longer_when_it_is_off():
    pipe = turbo(tiny.sd().to("cuda"))
    pipe.enable_partial_offload(300_000)
    tiny.picture(pipe)
    residency = residency_of(pipe)
    assert all(tensor.is_pinned() for group in residency.layers.streamed for tensor in group.tensors if tensor.numel())
    assert "page-locked" in str(pipe.turbo_report())
    on_host = turbo(tiny.sd())
    on_host.enable_partial_offload(300_000)
    tiny.picture(on_host)
    on_host.disable_offload()
    assert not any(parameter.is_pinned() for parameter in on_host.unet.parameters())


def test_weights_go_from_the_device_into_page_locked_memory_and_come_back():
    pipe = turbo(tiny.sd().to("cuda"))
    stock, before = tiny.picture(pipe), state_of(pipe)
    pipe.enable_partial_offload("all", denoiser_leaves=True)
    components = (pipe.unet, pipe.vae, pipe.text_encoder)
    weights = [tensor for part in components for tensor in weights_of(part) if tensor.numel()]
    assert all(tensor.device.type == "cpu" and tensor.is_pinned() for tensor in weights)
    assert residency_of(pipe).pinned.size >= sum(extent(tensor) for tensor in weights)
    assert distance(tiny.picture(pipe), stock).psnr_db > 60
    slabs = list(residency_of(pipe).pinned.slabs)
    places = [weakref.ref(slab) for slab in slabs]
    del slabs
    pipe.disable_offload()
    gc.collect()
    assert all(place() is None for place in places)
    assert differences(before, state_of(pipe)) == []


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
class TestFullSize:
    """Peaks and times of full-size models."""

    @pytest.fixture
    def pipe(self, name):
        gc.collect()  # a pipeline that a failed test's traceback held
        torch.cuda.empty_cache()
        return turbo(full_size.build(name))

    def picture(self, pipe, steps=4):
        latents = torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(0)).to("cuda", pipe.unet.dtype)
        size = {"height": 512, "width": 512, "latents": latents}
        return pipe("a red cat", num_inference_steps=steps, output_type="pt", **size).images.float().cpu()

    def seconds(self, pipe, steps=12):
        found = []
        for _ in range(3):
            start = time.perf_counter()
            self.picture(pipe, steps)  # on the CPU at last, so that it waits
            found.append(time.perf_counter() - start)
        return min(found)

    def test_peaks_go_with_the_share_that_stays(self, pipe):
        """The denoiser's memory grows as more of it stays; times beside other tests say nothing, and are for eyes."""
        whole = sum(parameter.nbytes for parameter in pipe.unet.parameters())
        stock = self.picture(pipe)
        found = []
        for share in (0.0, 0.25, 0.5, 0.75, 1.0):
            pipe.enable_partial_offload(int(whole * share) + MIB, denoiser_leaves=True)
            self.picture(pipe)
            peak, seconds = peak_bytes(lambda: self.picture(pipe)), self.seconds(pipe)
            window = 2 * max(group.size for group in residency_of(pipe).layers.groups) if share < 1 else 0
            found.append((share, peak, seconds, window))
            print(f"{share:.2f} of the denoiser stays: {peak / MIB:.0f} MiB, {seconds:.3f} s")
            assert distance(self.picture(pipe), stock).psnr_db >= 40
        pipe.turbo_undo()
        peaks = [peak for _, peak, _, _ in found]
        # where the decode is the peak, all shares are alike but for how its blocks come to lie
        assert all(more >= less - MIB for less, more in pairwise(peaks))
        for share, peak, _, window in found:
            # text encoders and the decode may be the peak; activations at 512 pixels are below 900 MiB
            assert peak <= max(peaks[0], whole * share + window + 900 * MIB)

    def test_a_plan_for_a_capped_card_runs_under_that_cap(self, pipe, name):
        """The allocator refuses what is over the cap, so that a wrong estimate is an error."""
        pipe.to("cpu")
        torch.cuda.empty_cache()
        cap = (4 if name == "sdxl" else 1.5) * 2**30
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(cap / total)
        try:
            auto_optimize(pipe, height=512, width=512, vram_budget=int(cap))
            assert any("offload" in step.action for step in pipe.turbo_report().plan.steps)
            assert torch.isfinite(self.picture(pipe)).all()
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
            pipe.turbo_undo()


@pytest.mark.parametrize("leaves", [False, True])
@pytest.mark.parametrize("make", [tiny.sd, tiny.sdxl], ids=["sd", "sdxl"])
def test_a_denoiser_that_comes_whole_is_recorded_and_takes_its_graphs_along(make, leaves):
    pipe = turbo(make().to("cuda"))
    stock, before = tiny.picture(pipe, steps=8), state_of(pipe)
    pipe.enable_partial_offload("all", denoiser_leaves=leaves)
    for switch in ("enable_cuda_graphs", "enable_time_projections", "enable_prompt_projections"):
        getattr(pipe, switch)()
    held = held_after_pictures(pipe, stock)
    graphs = recorded(pipe)
    assert graphs.reason is None
    assert graphs.captured == (4 if leaves else 1)
    assert (graphs.eager, graphs.replayed) == (1, 31)
    weights = sum(parameter.nbytes for parameter in pipe.unet.parameters())
    assert held[1:] == [held[1]] * 3
    if leaves:  # nothing of it is left on the device
        assert not any(parameter.is_cuda for parameter in pipe.unet.parameters())
        assert len(graphs.graphs) == 0
    else:
        assert held[-1] >= weights
    pipe.turbo_undo()
    assert differences(before, state_of(pipe)) == []
