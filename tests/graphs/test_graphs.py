"""Graphs give the eager picture whatever changes under them, with a capture that bakes in what a CUDA graph does."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from peft import LoraConfig

from diffusers_turbo import TurboError, turbo
from diffusers_turbo.bench.tasks import for_task, task_inputs
from diffusers_turbo.errors import InvalidOptionError, NotSupportedError
from diffusers_turbo.graphs.capture import CAPTURES
from tests import tiny
from tests.graphs.fake import FakeCapture
from tests.state import differences, state_of

LORA = LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)


def twin_pipes() -> tuple[Any, Any]:
    """Two equal pipelines, one with graphs that have been captured and replayed."""
    eager, graphed = tiny.sd(), turbo(tiny.sd())
    graphed.enable_cuda_graphs()
    assert torch.equal(tiny.picture(graphed, steps=3), tiny.picture(eager, steps=3))
    assert FakeCapture.made > 0
    return eager, graphed


def unet_call(pipe: Any) -> Any:
    return pipe.unet._compiled_call_impl


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


def new_data(pipe: Any) -> None:
    with torch.no_grad():
        pipe.unet.conv_in.weight.data = pipe.unet.conv_in.weight.data * 2


def in_place(pipe: Any) -> None:
    with torch.no_grad():
        pipe.unet.conv_in.weight.mul_(2)


def lora(pipe: Any) -> None:
    torch.manual_seed(0)
    pipe.unet.add_adapter(LORA)


def unload(pipe: Any) -> None:
    pipe.unet.delete_adapters("default")


class Scaled:
    """An attention processor with a plain number, as IP-Adapter's have."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.scale = inner, [0.7]

    def __call__(self, attn: Any, hidden_states: Any, encoder_hidden_states: Any = None, **kwargs: Any) -> Any:
        return self.inner(attn, hidden_states, encoder_hidden_states, **kwargs) * self.scale[0]


def scaled_processors(pipe: Any) -> None:
    pipe.unet.set_attn_processor({name: Scaled(found) for name, found in pipe.unet.attn_processors.items()})


def scale(value: float) -> Callable[[Any], None]:
    def change(pipe: Any) -> None:
        for processor in pipe.unet.attn_processors.values():
            processor.scale[0] = value

    return change


CHANGES: dict[str, list[Callable[[Any], None]]] = {
    "weights exchanged": [new_data],
    "weights changed in place": [in_place],
    "a LoRA loaded": [lora],
    "a LoRA's scale": [lora, lambda pipe: pipe.unet.set_adapters("default", 0.3)],
    "a LoRA switched off": [lora, lambda pipe: pipe.unet.disable_adapters()],
    "a LoRA unloaded": [lora, unload],
    "FreeU": [lambda pipe: pipe.enable_freeu(s1=0.6, s2=0.4, b1=1.4, b2=1.6)],
    "FreeU's numbers": [
        lambda pipe: pipe.enable_freeu(s1=0.6, s2=0.4, b1=1.4, b2=1.6),
        lambda pipe: pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4),
    ],
    "FreeU off": [lambda pipe: pipe.enable_freeu(s1=0.6, s2=0.4, b1=1.4, b2=1.6), lambda pipe: pipe.disable_freeu()],
    "processors": [scaled_processors],
    "a processor's scale": [scaled_processors, scale(0.5), scale(0.25)],
    "another dtype": [lambda pipe: pipe.to(torch.bfloat16)],
    "another dtype and back": [lambda pipe: pipe.to(torch.float64), lambda pipe: pipe.to(torch.float32)],
    "another scheduler step count": [lambda pipe: None],
}


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_under_graphs_gives_the_eager_picture(change):
    eager, graphed = twin_pipes()
    for alter in CHANGES[change]:
        before = tiny.picture(eager, steps=3)
        alter(eager)
        alter(graphed)
        for steps in (3, 4):
            expected = tiny.picture(eager, steps=steps)
            assert torch.equal(tiny.picture(graphed, steps=steps), expected)
        if change != "another scheduler step count" and "back" not in change:
            assert not torch.equal(tiny.picture(eager, steps=3), before), "the change changes nothing: no test"


def test_a_change_in_place_needs_no_new_capture():
    _, graphed = twin_pipes()
    tiny.picture(graphed, steps=3)  # the VAE is captured at its second picture
    made = FakeCapture.made
    in_place(graphed)
    tiny.picture(graphed, steps=3)
    assert FakeCapture.made == made
    new_data(graphed)
    tiny.picture(graphed, steps=3)
    assert FakeCapture.made > made


@pytest.mark.parametrize("change", ["a LoRA's scale", "FreeU's numbers", "a processor's scale"])
def test_a_callback_may_change_numbers_between_two_steps(change):
    eager, graphed = twin_pipes()
    first, *_, last = CHANGES[change]

    def between(pipe: Any, step: int, timestep: Any, tensors: Any) -> Any:
        if step == 1:
            last(pipe)
        return tensors

    first(eager)
    first(graphed)
    tiny.picture(graphed, steps=4)
    expected = tiny.picture(eager, steps=4, callback_on_step_end=between)
    assert torch.equal(tiny.picture(graphed, steps=4, callback_on_step_end=between), expected)


@pytest.mark.parametrize(
    "arguments",
    [
        {"batch": 2},
        {"height": 96, "width": 64},
        {"guidance_scale": 3.0},
        {"guidance_scale": 1.0},
        {"cross_attention_kwargs": {"scale": 0.5}},
        {"guidance_rescale": 0.7},
        {"num_images_per_prompt": 2, "latents": None},
    ],
    ids=str,
)
def test_arguments_of_the_call(arguments):
    eager, graphed = twin_pipes()
    lora(eager)
    lora(graphed)
    if "latents" in arguments:
        arguments = arguments | {"generator": None}
    pictures = []
    for pipe in (eager, graphed, graphed):
        if "latents" in arguments:
            arguments["generator"] = torch.Generator().manual_seed(0)
        pictures.append(tiny.picture(pipe, steps=3, **arguments))
    assert torch.equal(pictures[1], pictures[0])
    assert torch.equal(pictures[2], pictures[0])


def test_modes_of_the_caller():
    eager, graphed = twin_pipes()
    for mode in (torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.no_grad()):
        with mode:
            expected = tiny.picture(eager, steps=3)
            assert torch.equal(tiny.picture(graphed, steps=3), expected)
            assert torch.equal(tiny.picture(graphed, steps=3), expected)


def test_gradients_run_eagerly():
    _, graphed = twin_pipes()
    eager_calls = unet_call(graphed).eager
    sample = torch.randn(1, 4, 8, 8, requires_grad=True)
    graphed.unet(sample, 7, torch.randn(1, 5, tiny.CONTEXT)).sample.sum().backward()
    assert sample.grad is not None
    assert unet_call(graphed).eager == eager_calls


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
    pipe = turbo(tiny.sd())
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
    def make() -> Any:
        base = tiny.sd()
        torch.manual_seed(1)
        controlnet = ControlNetModel.from_unet(base.unet, conditioning_embedding_out_channels=(8, 8, 8, 8)).eval()
        with torch.no_grad():
            for block in controlnet.controlnet_down_blocks:  # made of zeros, which would control nothing
                block.weight.normal_()
        parts = {name: part for name, part in base.components.items() if name != "requires_safety_checker"}
        made = StableDiffusionControlNetPipeline(**parts, controlnet=controlnet, requires_safety_checker=False)
        made.set_progress_bar_config(disable=True)
        return made

    eager, graphed = make(), turbo(make())
    graphed.enable_cuda_graphs()
    picture = task_inputs("img2img", 32, 32, 1)["image"][0]
    for strength in (1.0, 1.0, 0.5):
        pictures = [
            tiny.picture(pipe, steps=3, image=picture, controlnet_conditioning_scale=strength, height=32, width=32)
            for pipe in (eager, graphed)
        ]
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


def test_a_lora_is_graphed():
    _, graphed = twin_pipes()
    lora(graphed)
    replayed = unet_call(graphed).replayed
    tiny.picture(graphed, steps=3)
    assert unet_call(graphed).replayed > replayed
