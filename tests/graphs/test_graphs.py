"""The life of graphs: captured, replayed, kept apart, evicted, copied, taken off; and what runs eagerly instead."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import nn

from diffusers_turbo import TurboError, turbo
from diffusers_turbo.bench.tasks import for_task, task_inputs
from diffusers_turbo.errors import InvalidOptionError, NotSupportedError
from diffusers_turbo.graphs.capture import CAPTURES
from tests import tiny
from tests.compilation import micro
from tests.controlled import controlled, controlled_picture
from tests.graphs.changing import twin_pipes, unet_call
from tests.graphs.fake import FakeCapture
from tests.state import differences, state_of


@pytest.mark.parametrize("make", [tiny.sd, tiny.sdxl, tiny.pixart])
def test_pictures_are_equal_to_the_bit_and_undo_leaves_nothing(make):
    pipe = turbo(make())
    stock = [tiny.picture(pipe, seed=seed, steps=3) for seed in range(3)]
    before = state_of(pipe)
    pipe.enable_cuda_graphs()
    for seed, expected in enumerate(stock):
        assert torch.equal(tiny.picture(pipe, seed=seed, steps=3), expected)
    denoiser = "UNet2DConditionModel" if hasattr(pipe, "unet") else "PixArtTransformer2DModel"
    assert f"{denoiser}: 1 captured, 1 kept, 8 replays" in str(pipe.turbo_report())
    pipe.disable_cuda_graphs()
    assert FakeCapture.alive == 0
    assert differences(before, state_of(pipe)) == []
    assert torch.equal(tiny.picture(pipe, steps=3), stock[0])


@pytest.mark.parametrize("graphs_first", [True, False])
@pytest.mark.parametrize("ahead", [False, True])
def test_slices_of_a_batch_share_one_graph(graphs_first, ahead):
    pipe = turbo(tiny.sdxl())
    stock, before = tiny.picture(pipe, batch=2, steps=3), state_of(pipe)
    switches = [pipe.enable_cuda_graphs, lambda: pipe.enable_denoiser_slicing(2)]
    if ahead:
        switches += [pipe.enable_time_projections, pipe.enable_prompt_projections]
    for switch in switches if graphs_first else reversed(switches):
        switch()
    for _ in range(2):
        ours = tiny.picture(pipe, batch=2, steps=3)
        assert (ours - stock).abs().max() < 1e-4
    told = str(pipe.turbo_report())
    assert "6 of 6 calls in slices of 2" in told
    assert "UNet2DConditionModel: 1 captured, 1 kept, 11 replays" in told
    pipe.turbo_undo()
    assert FakeCapture.alive == 0
    assert differences(before, state_of(pipe)) == []


def test_results_are_safe_to_keep():
    _, graphed = twin_pipes()
    inputs = [torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    context = torch.randn(2, 5, tiny.CONTEXT)
    with torch.no_grad():
        for _ in range(2):
            graphed.unet(inputs[0], 7, context)
        kept = graphed.unet(inputs[0], 7, context).sample
        values = kept.clone()
        graphed.unet(inputs[1], 7, context)
    assert torch.equal(kept, values)


def test_timesteps_as_numbers_and_tensors():
    eager, graphed = twin_pipes()
    sample, context = torch.randn(2, 4, 8, 8), torch.randn(2, 5, tiny.CONTEXT)
    with torch.no_grad():
        for timestep in (7, 7, 9, torch.tensor(7), torch.tensor(7), torch.tensor(9), 7.0, 7.0):
            expected = eager.unet(sample, timestep, context).sample
            assert torch.equal(graphed.unet(sample, timestep, context).sample, expected)
            assert torch.equal(graphed.unet(sample, timestep, context, return_dict=False)[0], expected)


def test_the_least_recently_used_graphs_go(captures_on_the_cpu):
    eager, graphed = tiny.sd(), turbo(tiny.sd())
    graphed.enable_cuda_graphs(max_graphs=2)
    sizes = [(64, 64), (96, 64), (64, 96), (96, 96)]
    for height, width in sizes * 2:
        expected = tiny.picture(eager, steps=3, height=height, width=width)
        assert torch.equal(tiny.picture(graphed, steps=3, height=height, width=width), expected)
        assert len(unet_call(graphed).graphs) <= 2
        # denoiser, VAE decoder, text encoder
        assert captures_on_the_cpu.alive <= 3 * 2


def test_forward_hooks_run_and_are_reported():
    eager, graphed = twin_pipes()
    seen: list[int] = []
    handle = graphed.unet.mid_block.register_forward_hook(lambda *args: seen.append(1))
    assert torch.equal(tiny.picture(graphed, steps=3), tiny.picture(eager, steps=3))
    assert len(seen) == 3
    assert "mid_block carries forward hooks, which a replay would not run" in str(graphed.turbo_report())
    handle.remove()
    tiny.picture(graphed, steps=3)
    assert "hooks" not in str(graphed.turbo_report())


def test_text_encoders_that_note_their_hidden_states_by_hooks_are_replayed():
    stock, pipe = tiny.sdxl(), turbo(tiny.sdxl())
    pipe.enable_cuda_graphs()
    for _ in range(3):
        assert torch.equal(tiny.picture(pipe, steps=2), tiny.picture(stock, steps=2))
    for name in ("text_encoder", "text_encoder_2"):
        encoder = getattr(pipe, name)
        assert any(module._forward_hooks for module in encoder.modules()), "transformers has another way by now"
        call = encoder._compiled_call_impl
        assert (call.eager, call.captured, call.replayed, call.reason) == (1, 1, 2, None)
    seen = []
    linear = next(module for module in pipe.text_encoder.modules() if isinstance(module, nn.Linear))
    handle = linear.register_forward_hook(lambda *_: seen.append(1))
    tiny.picture(pipe, steps=2)
    assert seen
    assert "forward hooks" in pipe.text_encoder._compiled_call_impl.reason
    handle.remove()
    tiny.picture(pipe, steps=2)
    assert pipe.text_encoder._compiled_call_impl.reason is None


def test_offload_runs_eagerly_and_graphs_over_offload_are_refused():
    eager, graphed = twin_pipes()
    graphed.enable_group_offload(onload_device="cpu", offload_type="leaf_level")
    assert torch.equal(tiny.picture(graphed, steps=3), tiny.picture(eager, steps=3))
    assert "carries offload hooks" in str(graphed.turbo_report())
    other = turbo(tiny.sd())
    other.enable_group_offload(onload_device="cpu", offload_type="leaf_level")
    with pytest.raises(NotSupportedError, match=r"enable_cuda_graphs\(\): found .*offload hooks"):
        other.enable_cuda_graphs()


def test_what_cannot_be_captured_runs_eagerly_and_says_why(monkeypatch):
    class Refusing(FakeCapture):
        def __init__(self, run: Any, device: torch.device) -> None:
            raise RuntimeError("operation not permitted when stream is capturing")

    eager, graphed = tiny.sd(), turbo(tiny.sd())
    monkeypatch.setitem(CAPTURES, "cpu", Refusing)
    graphed.enable_cuda_graphs()
    for _ in range(2):
        assert torch.equal(tiny.picture(graphed, steps=3), tiny.picture(eager, steps=3))
    assert "could not be captured: RuntimeError: operation not permitted" in str(graphed.turbo_report())


@pytest.mark.parametrize("graphs_first", [True, False])
@pytest.mark.parametrize("undo_graphs_first", [True, False])
def test_over_a_compiled_unet_in_any_order(graphs_first, undo_graphs_first):
    pipe = micro.sd()
    stock, before = tiny.picture(pipe, steps=3), state_of(pipe)
    switches = [pipe.enable_cuda_graphs, lambda: pipe.compile_unet(backend="eager")]
    for switch in switches if graphs_first else reversed(switches):
        switch()
    assert torch.equal(tiny.picture(pipe, steps=3), stock)
    assert unet_call(pipe).captured == 1
    assert unet_call(pipe).inner != pipe.unet._call_impl, "the graph is of the eager call"
    ways_off = [pipe.disable_cuda_graphs, pipe.uncompile]
    for off in ways_off if undo_graphs_first else reversed(ways_off):
        off()
        assert torch.equal(tiny.picture(pipe, steps=3), stock)
    assert differences(before, state_of(pipe)) == []


def test_beside_other_switches():
    pipe = turbo(tiny.sd())
    stock = tiny.picture(pipe, steps=3)
    pipe.enable_cuda_graphs()
    for method in ("enable_naive_attention", "enable_channels_last", "fuse_qkv_projections", "enable_vae_slicing"):
        getattr(pipe, method)()
        plain = turbo(tiny.sd())
        for lever in pipe.turbo_report().levers:
            if lever.action != "enable_cuda_graphs":
                getattr(plain, lever.action)()
        assert torch.equal(tiny.picture(pipe, steps=3), tiny.picture(plain, steps=3)), method
    pipe.turbo_undo()
    assert torch.equal(tiny.picture(pipe, steps=3), stock)


def test_copies_have_graphs_of_their_own():
    eager, graphed = twin_pipes()
    expected = tiny.picture(eager, steps=3)
    for twin in (copy.deepcopy(graphed), pickle.loads(pickle.dumps(graphed))):
        assert unet_call(twin) is not unet_call(graphed)
        assert unet_call(twin).module is twin.unet
        assert torch.equal(tiny.picture(twin, steps=3), expected)
        assert torch.equal(tiny.picture(twin, steps=3), expected)
        twin.turbo_undo()
        assert twin.unet._compiled_call_impl is None
    assert torch.equal(tiny.picture(graphed, steps=3), expected)


def test_a_copy_of_a_compiled_pipeline_is_graphed_over_the_compiled_call():
    pipe = turbo(tiny.sd())
    pipe.enable_cuda_graphs()
    pipe.compile_unet(backend="eager")
    twin = copy.deepcopy(pipe)
    assert unet_call(twin).inner != twin.unet._call_impl
    assert torch.equal(tiny.picture(twin, steps=3), tiny.picture(pipe, steps=3))


def test_two_threads_share_a_graph():
    eager, graphed = twin_pipes()
    context = torch.randn(2, 5, tiny.CONTEXT)
    samples = [torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    with torch.no_grad():
        expected = [eager.unet(sample, 7, context).sample for sample in samples]
    wrong: list[int] = []

    def work(index: int) -> None:
        with torch.no_grad():
            for _ in range(20):
                if not torch.equal(graphed.unet(samples[index], 7, context).sample, expected[index]):
                    wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("task", ["img2img", "inpaint"])
def test_other_tasks(task):
    eager = for_task(tiny.sd(), task)
    graphed = turbo(for_task(tiny.sd(), task))
    graphed.enable_cuda_graphs()
    for _ in range(2):
        pictures = [
            pipe(
                "red cat",
                num_inference_steps=3,
                output_type="pt",
                generator=torch.Generator().manual_seed(0),
                **task_inputs(task, 64, 64, 1),
            ).images
            for pipe in (eager, graphed)
        ]
        assert torch.equal(*pictures)
    assert unet_call(graphed).replayed > 0


def test_controlnet():
    eager, graphed = controlled(), turbo(controlled())
    graphed.enable_cuda_graphs()
    for strength in (1.0, 1.0, 0.5):
        pictures = [controlled_picture(pipe, controlnet_conditioning_scale=strength) for pipe in (eager, graphed)]
        assert torch.equal(*pictures)
    assert graphed.controlnet._compiled_call_impl.replayed > 0


def test_a_call_that_somebody_replaced_is_left_alone():
    _, graphed = twin_pipes()
    graphed.unet._compiled_call_impl = other = graphed.unet._call_impl
    assert "the call of UNet2DConditionModel was replaced meanwhile" in graphed.turbo_undo().left_alone[0]
    assert graphed.unet._compiled_call_impl == other


def test_refusals():
    pipe = turbo(tiny.sd())
    for wrong in (0, -1, 1.5, None, True):
        with pytest.raises(InvalidOptionError, match="max_graphs"):
            pipe.enable_cuda_graphs(max_graphs=wrong)
    CAPTURES.pop("cpu")
    before = state_of(pipe)
    with pytest.raises(TurboError, match=r"enable_cuda_graphs\(\): found the unet on cpu; needed: a CUDA device"):
        pipe.enable_cuda_graphs()
    assert differences(before, state_of(pipe)) == []


def test_dropout_in_training_mode_runs_eagerly():
    _, graphed = twin_pipes()
    attention = next(module for module in graphed.unet.modules() if hasattr(module, "to_out"))
    attention.to_out[1].p = 0.5
    attention.train()
    tiny.picture(graphed, steps=3)
    assert "is in training mode" in str(graphed.turbo_report())
    attention.eval()
    tiny.picture(graphed, steps=3)
    assert "training" not in str(graphed.turbo_report())
