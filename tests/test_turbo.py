"""`turbo(pipe)`: the same object, the same output, and everything diffusers does with pipelines still works."""

from __future__ import annotations

import copy
import inspect
import json
import pickle

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline

from diffusers_turbo import TurboError, TurboMixin, turbo
from tests import tiny
from tests.state import differences, state_of


def test_same_object_same_class_same_output_bit_for_bit(pipe):
    stock, before = tiny.picture(pipe), state_of(pipe)
    returned = turbo(pipe)
    assert returned is pipe
    assert isinstance(pipe, StableDiffusionPipeline)
    assert isinstance(pipe, TurboMixin)
    assert differences(before, state_of(pipe)) == []
    assert torch.equal(tiny.picture(pipe), stock)


def test_twice_is_once(pipe):
    once = type(turbo(pipe))
    assert type(turbo(pipe)) is once


def test_call_keeps_name_signature_and_docstring(pipe, xl_pipe):
    for each in (pipe, xl_pipe):
        turbo(each)
    for each, host in ((pipe, StableDiffusionPipeline), (xl_pipe, StableDiffusionXLPipeline)):
        assert inspect.signature(type(each).__call__) == inspect.signature(host.__call__)
        assert type(each).__call__.__doc__ == host.__call__.__doc__
        assert inspect.signature(type(each).__init__) == inspect.signature(host.__init__)


def test_unfusing_one_part_keeps_the_other(pipe):
    turbo(pipe).fuse_qkv_projections()
    pipe.unfuse_qkv_projections(unet=True, vae=False)
    assert not hasattr(pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1, "to_qkv")
    assert hasattr(pipe.vae.decoder.mid_block.attentions[0], "to_qkv")
    pipe.unfuse_qkv_projections()
    assert pipe.turbo_report().levers == ()


def test_save_and_load_leave_the_same_model_index(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "stock")
    turbo(pipe)
    pipe.enable_vae_slicing()
    pipe.save_pretrained(tmp_path / "turbo")
    stock, ours = (json.loads((tmp_path / name / "model_index.json").read_text()) for name in ("stock", "turbo"))
    assert ours == stock
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path / "turbo", safety_checker=None)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(tiny.picture(loaded), tiny.picture(tiny.sd()))


def test_from_pipe_both_ways(pipe):
    turbo(pipe)
    image_to_image = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    assert image_to_image.unet is pipe.unet
    assert not isinstance(image_to_image, TurboMixin)
    back = type(pipe).from_pipe(image_to_image)
    assert isinstance(back, TurboMixin)
    assert torch.equal(tiny.picture(back), tiny.picture(pipe))


@pytest.mark.parametrize(
    "carry", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize(
    "switch",
    [
        None,
        "enable_sdpa",
        "enable_naive_attention",
        "enable_attention_slicing",
        "enable_channels_last",
        "enable_half_precision",
        "enable_tf32",
        "fuse_qkv_projections",
        "enable_vae_slicing",
        "enable_vae_tiling",
        "enable_sync_free_loop",
    ],
)
def test_copies_have_a_ledger_of_their_own(pipe, carry, switch):
    stock = tiny.picture(turbo(pipe))
    if switch == "enable_half_precision":
        pipe.enable_half_precision("bfloat16")
    elif switch:
        getattr(pipe, switch)()
    under_switch = tiny.picture(pipe)
    twin = carry(pipe)
    assert type(twin) is type(pipe)
    assert str(twin.turbo_report()) == str(pipe.turbo_report())
    assert torch.equal(tiny.picture(twin), under_switch)
    assert twin.turbo_undo().left_alone == ()
    assert torch.equal(tiny.picture(twin), stock)
    # the original is as it was: its lever is still on
    assert len(pipe.turbo_report().levers) == (0 if switch is None else 1 + (switch == "fuse_qkv_projections"))
    assert torch.equal(tiny.picture(pipe), under_switch)


HOOKED = {
    "enable_model_cpu_offload": {"device": "cpu"},
    "enable_group_offload": {"onload_device": "cpu", "offload_type": "leaf_level"},
    "enable_partial_offload": {"resident_bytes": 700_000, "device": "cpu"},
    "trace_unet": {},
}


@pytest.mark.parametrize("switch", HOOKED)
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_hooked_pipelines_copy_and_refuse_to_be_pickled(pipe, switch):
    stock, before = tiny.picture(turbo(pipe)), state_of(pipe)
    getattr(pipe, switch)(**HOOKED[switch])
    with pytest.raises(TurboError, match=rf"pickling a StableDiffusionPipeline: found {switch}\(\) in force"):
        pickle.dumps(pipe)
    twin = copy.deepcopy(pipe)
    called = []
    for each in (pipe, twin):
        each.unet.conv_in.register_forward_hook(lambda module, args, output: called.append(module))
    if switch != "trace_unet":  # inside a trace hooks do not run
        tiny.picture(twin)
        assert {id(module) for module in called} == {id(twin.unet.conv_in)}, "the copy called the original's modules"
    twin.turbo_undo()
    assert torch.equal(tiny.picture(twin), stock)
    pipe.turbo_undo()
    pipe.unet.conv_in._forward_hooks.clear()
    assert differences(before, state_of(pipe)) == []


def test_a_compiled_copy_is_compiled_anew(pipe):
    turbo(pipe).compile_unet(backend="aot_eager")
    twin = copy.deepcopy(pipe)
    assert twin.unet._compiled_call_impl is not None
    assert twin.unet._compiled_call_impl is not pipe.unet._compiled_call_impl
    twin.uncompile()
    assert twin.unet._compiled_call_impl is None
    assert pipe.unet._compiled_call_impl is not None


def test_shallow_copy_shares_modules_and_ledger(pipe):
    turbo(pipe).enable_vae_slicing()
    twin = copy.copy(pipe)
    twin.turbo_undo()
    assert pipe.vae.use_slicing is False


def test_components_and_to(pipe):
    names = set(pipe.components)
    turbo(pipe)
    assert set(pipe.components) == names
    assert pipe.to(torch.float64) is pipe
    assert pipe.unet.dtype == torch.float64


def test_a_class_with_the_mixin_in_front(pipe):
    class MyPipe(TurboMixin, StableDiffusionPipeline):
        """A user's own pipeline."""

    mine = MyPipe(**pipe.components, requires_safety_checker=False)
    mine.set_progress_bar_config(disable=True)
    assert turbo(mine) is mine
    assert type(mine) is MyPipe
    assert inspect.signature(MyPipe.__call__) == inspect.signature(StableDiffusionPipeline.__call__)
    stock = tiny.picture(pipe)
    mine.enable_naive_attention()
    assert {type(p).__name__ for p in mine.unet.attn_processors.values()} == {"NaiveAttnProcessor"}
    mine.turbo_undo()
    assert torch.equal(tiny.picture(mine), stock)


def test_a_subclass_that_calls_super(pipe):
    class Counting(TurboMixin, StableDiffusionPipeline):
        calls = 0

        def __call__(self, *args, **kwargs):
            Counting.calls += 1
            return super().__call__(*args, **kwargs)

    mine = Counting(**pipe.components, requires_safety_checker=False)
    mine.set_progress_bar_config(disable=True)
    mine.enable_tf32()
    assert torch.equal(tiny.picture(mine), tiny.picture(pipe))
    assert Counting.calls == 1


def test_xl_and_transformer_pipelines(xl_pipe, pixart_pipe):
    for pipe in (xl_pipe, pixart_pipe):
        stock = tiny.picture(pipe)
        turbo(pipe)
        assert torch.equal(tiny.picture(pipe), stock)


@pytest.mark.parametrize(
    ("thing", "found"), [(object(), "object"), (None, "NoneType"), (torch.nn.Linear(1, 1), "Linear")]
)
def test_not_a_pipeline(thing, found):
    with pytest.raises(TurboError, match=f"an object of type {found}.*needed: a diffusers pipeline"):
        turbo(thing)


def test_a_pipeline_without_denoiser(pipe):
    pipe.unet = None
    with pytest.raises(TurboError, match="no denoiser among its components"):
        turbo(pipe)


def test_environment_variable_switches_memory_efficient_attention_on(pipe, monkeypatch):
    monkeypatch.setenv("USE_MEMORY_EFFICIENT_ATTENTION", "1")
    turbo(pipe)
    (lever,) = pipe.turbo_report().levers
    assert lever.action in ("enable_sdpa", "enable_xformers_memory_efficient_attention")
    pipe.turbo_undo()
    assert pipe.turbo_report().levers == ()


def test_the_scheduler_stays_the_hosts(pipe):
    turbo(pipe)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    assert pipe.config.scheduler[1] == "DDIMScheduler"
