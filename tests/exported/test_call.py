"""Exported code and the UNet it stands in for: what changes is in the picture, what does not fit runs eagerly."""

from __future__ import annotations

import copy
import inspect
import pickle
import re

import pytest
import torch
from peft import LoraConfig

from diffusers_turbo import TurboError, turbo
from diffusers_turbo.exported.inputs import Bounds
from tests import tiny
from tests.exported.fake import FakeRunner
from tests.state import differences, state_of

LORA = LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)


def told(pipe) -> str:
    return str(pipe.turbo_report())


def test_the_picture_the_counts_and_the_way_back(twins):
    tiny.picture(twins.ours)
    before, stock = state_of(twins.ours), tiny.picture(twins.plain)
    signature = inspect.signature(twins.ours.unet.forward)
    twins.ours.load_exported_unet(twins.path)
    assert torch.equal(tiny.picture(twins.ours), stock)
    assert "2 calls as exported, weights bound 1 time" in told(twins.ours)
    assert "eagerly" not in told(twins.ours)
    assert inspect.signature(twins.ours.unet.forward) == signature
    assert twins.ours.unet.state_dict().keys() == twins.plain.unet.state_dict().keys()
    twins.ours.unload_exported_unet()
    assert differences(before, state_of(twins.ours)) == []


def new_data(pipe):
    pipe.unet.conv_in.weight.data = pipe.unet.conv_in.weight.data * 2


def new_parameter(pipe):
    pipe.unet.conv_in.weight = torch.nn.Parameter(pipe.unet.conv_in.weight.detach() * 2)


def fused_and_unloaded(pipe):
    """As load_lora_weights, fuse_lora and unload_lora_weights leave a UNet."""
    pipe.unet.add_adapter(LORA)
    pipe.unet.fuse_lora()
    pipe.unload_lora_weights()


STILL_EXPORTED = {
    "weights in place": lambda pipe: pipe.unet.conv_in.weight.data.mul_(0.5),
    "a bias of four": lambda pipe: pipe.unet.conv_out.bias.data.add_(0.5),
    "new data": new_data,
    "a new parameter": new_parameter,
    "a LoRA, fused and unloaded": fused_and_unloaded,
}
EAGERLY = {
    "a LoRA": (lambda pipe: pipe.unet.add_adapter(LORA), "no .*to_q.weight.*: an adapter wraps its layers"),
    "FreeU": (
        lambda pipe: pipe.enable_freeu(s1=0.6, s2=0.4, b1=1.4, b2=1.6),
        r"other numbers of FreeU or LoRA in up_blocks.0.*s1=0.6.*exported none",
    ),
    "other processors": (
        lambda pipe: pipe.unet.set_default_attn_processor(),
        r"other attention processors in .*AttnProcessor\(\), exported AttnProcessor2_0\(\)",
    ),
    "another dtype": (lambda pipe: pipe.to(torch.float64), "another dtype of .*float64, exported float32"),
    "another layout": (lambda pipe: pipe.unet.to(memory_format=torch.channels_last), "another strides of .*conv"),
    "a hook": (
        lambda pipe: pipe.unet.conv_in.register_forward_hook(lambda module, args, output: output * 1.5),
        "conv_in carries forward hooks",
    ),
    "dropout": (
        lambda pipe: pipe.unet.conv_in.add_module("drop", torch.nn.Dropout(0.5).train()),
        "conv_in.drop is in training mode",
    ),
}


@pytest.mark.parametrize("change", STILL_EXPORTED, ids=str)
def test_changed_weights_are_in_the_picture(twins, change):
    stock = tiny.picture(twins.plain)
    twins.ours.load_exported_unet(twins.path)
    assert torch.equal(tiny.picture(twins.ours), stock)
    for pipe in (twins.ours, twins.plain):
        torch.manual_seed(1)
        STILL_EXPORTED[change](pipe)
    wanted = tiny.picture(twins.plain)
    assert not torch.equal(wanted, stock)
    assert torch.equal(tiny.picture(twins.ours), wanted)
    assert "4 calls as exported" in told(twins.ours)


@pytest.mark.parametrize("change", EAGERLY, ids=str)
def test_what_the_code_was_not_made_for_runs_the_unet_itself(twins, change, caplog):
    step, reason = EAGERLY[change]
    twins.ours.load_exported_unet(twins.path)
    tiny.picture(twins.ours)
    for pipe in (twins.ours, twins.plain):
        torch.manual_seed(1)
        step(pipe)
    assert torch.equal(tiny.picture(twins.ours), tiny.picture(twins.plain))
    assert "2 calls as exported" in told(twins.ours)
    (line,) = [line for line in told(twins.ours).splitlines() if "2 eagerly" in line]
    assert re.search(reason, line), line
    assert caplog.text.count("the UNet runs eagerly") == 1


def test_what_fits_again_runs_exported_again(twins):
    twins.ours.load_exported_unet(twins.path)
    twins.ours.unet.add_adapter(LORA)
    tiny.picture(twins.ours)
    twins.ours.unload_lora_weights()
    assert torch.equal(tiny.picture(twins.ours), tiny.picture(twins.plain))
    assert "2 calls as exported" in told(twins.ours)


def test_a_change_between_two_steps(twins):
    """A callback exchanges the processors, which are looked at in every call."""
    twins.ours.load_exported_unet(twins.path)

    def callback(pipe, step, timestep, tensors):
        pipe.unet.set_default_attn_processor()
        return tensors

    pictures = [tiny.picture(p, steps=3, callback_on_step_end=callback) for p in (twins.ours, twins.plain)]
    assert torch.equal(*pictures)
    assert "1 calls as exported" in told(twins.ours)
    assert "2 eagerly: other attention processors" in told(twins.ours)


def inputs(rows=2, height=8, width=8, tokens=5):
    generator = torch.Generator().manual_seed(rows)
    return (
        torch.randn(rows, 4, height, width, generator=generator),
        7,
        torch.randn(rows, tokens, tiny.CONTEXT, generator=generator),
    )


CALLS = {
    "a plain one": ((), {}, None),
    "no dictionary": ((), {"return_dict": False}, None),
    "one row": ((), {"rows": 1}, None),
    "a tensor of no dimensions": ((), {"timestep": torch.tensor(7)}, None),
    "a timestep a row": ((), {"timestep": torch.tensor([7.0, 300.0])}, None),
    "a timestep in half precision": ((), {"timestep": torch.tensor(7, dtype=torch.float16)}, None),
    "channels-last latents": ((), {"sample": torch.randn(2, 4, 8, 8).to(memory_format=torch.channels_last)}, None),
    "nothing more": ((None, None), {"cross_attention_kwargs": None}, None),
    "ControlNet": (
        (),
        {
            "down_block_additional_residuals": tuple(torch.ones(1) for _ in range(4)),
            "mid_block_additional_residual": torch.ones(1),
        },
        "down_block_additional_residuals, mid_block_additional_residual was given, which was not exported",
    ),
    "cross_attention_kwargs": ((), {"cross_attention_kwargs": {"scale": 0.5}}, "cross_attention_kwargs was given"),
    "a mask": ((), {"encoder_attention_mask": torch.ones(2, 5)}, "encoder_attention_mask was given"),
    "IP-Adapter": ((), {"added_cond_kwargs": {"image_embeds": torch.ones(2, 1)}}, "image_embeds was given"),
    "a size between": ((), {"height": 9}, "a latent of 9 x 8, exported for multiples of 2"),
    "too many rows": ((), {"rows": 64}, "64 rows, exported for 1 to 63"),
    "one token": ((), {"tokens": 1}, "1 tokens, exported for 2 to 1024"),
}


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_arguments(twins, call):
    args, kwargs, reason = copy.deepcopy(CALLS[call])
    sizes = {name: kwargs.pop(name) for name in ("rows", "height", "tokens") if name in kwargs}
    sample, timestep, context = inputs(**sizes)
    sample, timestep = kwargs.pop("sample", sample), kwargs.pop("timestep", timestep)
    twins.ours.load_exported_unet(twins.path)
    with torch.no_grad():
        results = [pipe.unet(sample, timestep, context, *args, **kwargs) for pipe in (twins.ours, twins.plain)]
    assert type(results[0]) is type(results[1])
    torch.testing.assert_close(results[0][0], results[1][0])  # strides of the latents decide how they are summed
    assert ("1 calls as exported" if reason is None else f"1 eagerly: {reason}") in told(twins.ours)


def test_gradients_and_autocast_run_the_unet_itself(twins):
    twins.ours.load_exported_unet(twins.path)
    twins.ours.unet(*inputs()).sample.sum().backward()
    assert twins.ours.unet.conv_in.weight.grad is not None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        results = [pipe.unet(*inputs()).sample for pipe in (twins.ours, twins.plain)]
    assert torch.equal(*results)
    assert "1 eagerly: gradients are recorded" in told(twins.ours)
    assert "1 eagerly: autocast is on" in told(twins.ours)


@pytest.mark.parametrize(
    "carry", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))], ids=["copy", "pickle"]
)
def test_copies_load_the_file_for_themselves_or_say_that_they_run_without(twins, carry):
    twins.ours.load_exported_unet(twins.path)
    twin = carry(twins.ours)
    twin.unet.conv_in.weight.data.mul_(2)
    assert not torch.equal(tiny.picture(twin), tiny.picture(twins.ours)), "both on the weights of one"
    assert torch.equal(tiny.picture(twins.ours), tiny.picture(twins.plain))
    assert "2 calls as exported" in told(twin)
    twins.path.unlink()
    alone = carry(twins.ours)
    assert torch.equal(tiny.picture(alone), tiny.picture(twins.plain))
    assert "this copy runs eagerly: reading" in told(alone)
    assert "No such file" in told(alone)
    alone.turbo_undo()
    assert alone.unet._compiled_call_impl is None


def test_beside_compile_trace_and_offload(twins):
    pipe = twins.ours
    pipe.compile_unet(backend="eager")
    with pytest.raises(
        TurboError, match="found a UNet2DConditionModel that is compiled, exported or under graphs already"
    ):
        pipe.load_exported_unet(twins.path)
    pipe.uncompile()
    pipe.load_exported_unet(twins.path)
    with pytest.raises(TurboError, match="compiled already"):
        pipe.compile_unet(backend="eager")
    pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(tiny.picture(pipe), tiny.picture(twins.plain))
    assert "2 eagerly: UNet2DConditionModel carries offload hooks" in told(pipe)
    pipe.disable_offload()
    assert torch.equal(tiny.picture(pipe), tiny.picture(twins.plain))
    assert "2 calls as exported" in told(pipe)


def test_graphs_go_over_it(twins, monkeypatch):
    from diffusers_turbo.graphs.capture import CAPTURES
    from tests.graphs.fake import FakeCapture

    monkeypatch.setitem(CAPTURES, "cpu", FakeCapture)
    pipe = twins.ours
    pipe.enable_cuda_graphs()
    pipe.load_exported_unet(twins.path)
    assert type(pipe.unet._compiled_call_impl.inner).__name__ == "ExportedCall"
    assert torch.equal(tiny.picture(pipe, steps=3), tiny.picture(twins.plain, steps=3))
    for each in (pipe, twins.plain):
        new_data(each)
    assert torch.equal(tiny.picture(pipe, steps=3), tiny.picture(twins.plain, steps=3))
    pipe.unload_exported_unet()
    assert torch.equal(tiny.picture(pipe, steps=3), tiny.picture(twins.plain, steps=3))
    assert pipe.unet._compiled_call_impl.inner == pipe.unet._call_impl
    pipe.turbo_undo()
    assert "_compiled_call_impl" not in vars(pipe.unet)


def test_bounds_name_what_was_not_exported():
    bounds = Bounds(
        rows=[1, 63], height=[4, 1024], width=[4, 1024], multiple=2, tokens=[2, 1024], widest=2560, channels=4,
        context=32, added=[],
    )  # fmt: skip

    def reasons(*shape, context=(5, 32)):
        return bounds.reasons_against(torch.empty(shape, device="meta"), torch.empty(shape[0], *context), [])

    assert reasons(2, 4, 64, 64) == []
    assert reasons(2, 4, 2, 64) == ["2 latent height, exported for 4 to 1024"]
    assert reasons(2, 9, 64, 64)[0].startswith("inputs of shapes")
    assert reasons(2, 4, 64, 64, context=(5, 33))[0].startswith("inputs of shapes")
    # 60 x 256 x 256 x 2560 would not fit into 32 bits
    assert reasons(60, 4, 256, 256) == ["activations of more than 2147483647 elements at 60 x 256 x 256"]


def test_wrong_code_is_not_written(twins, monkeypatch, tmp_path):
    before = twins.path.read_bytes()
    monkeypatch.setattr(FakeRunner, "error", 0.01)
    with pytest.raises(
        TurboError, match=r"found code that is 1.0e-02 away from the UNet itself; needed: at most 1e-04"
    ):
        twins.ours.export_unet(twins.path)
    assert [path.name for path in tmp_path.iterdir()] == ["unet.pt2"]
    assert twins.path.read_bytes() == before


def test_a_class_without_a_unet_says_so():
    with pytest.raises(TurboError, match=r"export_unet\('x.pt2'\): found no `unet` in PixArtAlphaPipeline"):
        turbo(tiny.pixart()).export_unet("x.pt2")
