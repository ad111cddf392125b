"""The prompt projected once a call: the eager picture whatever is changed, and no more work than promised."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from diffusers_turbo import turbo
from diffusers_turbo.actions.prompt import PromptCall
from diffusers_turbo.actions.stripes import State
from diffusers_turbo.bench.tasks import for_task, task_inputs
from diffusers_turbo.errors import NotSupportedError
from tests import dynamo, tiny
from tests.algebra.changing import between_steps, lora_on, no_more_guidance
from tests.compilation import micro
from tests.controlled import controlled, controlled_picture
from tests.graphs.changing import CHANGES, Scaled, lora, unload
from tests.state import differences, state_of


def twins(make: Any = tiny.sd, **arguments: Any) -> tuple[Any, Any]:
    """A stock pipeline, and its equal with the prompt projected ahead."""
    ahead = turbo(make(**arguments))
    ahead.enable_prompt_projections()
    return make(**arguments), ahead


def projected(pipe: Any) -> int:
    return pipe.unet._compiled_call_impl.made


def same_picture(stock: Any, ahead: Any, **arguments: Any) -> bool:
    arguments = {"steps": 3, "batch": 2, **arguments}
    return torch.equal(tiny.picture(ahead, **arguments), tiny.picture(stock, **arguments))


class Products(TorchFunctionMode):
    """Counts the linear layers that run with one weight."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight, self.count = weight, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.nn.functional.linear and args[1] is self.weight
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("make", [tiny.sd, tiny.sdxl])
def test_each_projection_runs_once_a_call(make):
    stock, ahead = twins(make)
    for attn in (ahead.unet.mid_block.attentions[0].transformer_blocks[0].attn2,):
        for weight in (attn.to_k.weight, attn.to_v.weight):
            with Products(weight) as products:
                tiny.picture(ahead, steps=4)
            assert products.count == 1
    with Products(stock.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.weight) as products:
        tiny.picture(stock, steps=4)
    assert products.count == 4
    assert same_picture(stock, ahead)


@pytest.mark.parametrize("change", CHANGES)
def test_the_eager_picture_after_any_change(change):
    stock, ahead = twins()
    assert same_picture(stock, ahead)
    for alter in CHANGES[change]:
        alter(stock)
        alter(ahead)
        assert same_picture(stock, ahead)


def new_prompt(pipe: Any, kwargs: dict[str, Any]) -> None:
    kwargs["prompt_embeds"] = kwargs["prompt_embeds"].flip(1)


def prompt_in_place(pipe: Any, kwargs: dict[str, Any]) -> None:
    kwargs["prompt_embeds"].mul_(0.5)


def weights_in_place(pipe: Any, kwargs: dict[str, Any]) -> None:
    with torch.no_grad():
        for attn in (block.attn2 for block in pipe.unet.mid_block.attentions[0].transformer_blocks):
            attn.to_k.weight.mul_(2)


def weights_exchanged(pipe: Any, kwargs: dict[str, Any]) -> None:
    attn = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    attn.to_v.weight.data = attn.to_v.weight.data * 2


KEYS = ("to_k", "to_v")

BETWEEN_STEPS = {
    "another prompt": new_prompt,
    "the prompt in place": prompt_in_place,
    "weights in place": weights_in_place,
    "weights exchanged": weights_exchanged,
    "a LoRA loaded": lambda pipe, kwargs: lora_on(pipe, *KEYS),
    "guidance ended": no_more_guidance,
}


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("change", BETWEEN_STEPS)
def test_a_callback_may_change_anything_between_two_steps(change, graphs, captures_on_the_cpu):
    stock, ahead = twins()
    if graphs:
        ahead.enable_cuda_graphs()
        assert same_picture(stock, ahead)
    callback = between_steps(BETWEEN_STEPS[change])
    assert same_picture(stock, ahead, steps=4, **callback)
    assert same_picture(stock, ahead)


def test_a_loras_scale_between_two_steps():
    stock, ahead = twins()
    for pipe in (stock, ahead):
        lora_on(pipe, *KEYS)
    plain = tiny.picture(ahead, steps=3)
    callback = between_steps(lambda pipe, kwargs: pipe.unet.set_adapters("default", 0.2))
    assert same_picture(stock, ahead, **callback)
    assert not torch.equal(tiny.picture(ahead, steps=3), plain)


def test_without_the_state_a_stale_projection_would_be_used(monkeypatch):
    """The tests above can fail: with nothing watched, the picture is wrong."""
    monkeypatch.setattr(State, "now", lambda self: ())
    stock, ahead = twins()
    assert not same_picture(stock, ahead, **between_steps(weights_in_place))


def test_a_lora_on_keys_and_values_is_projected_ahead_too():
    stock, ahead = twins()
    for pipe in (stock, ahead):
        lora_on(pipe, *KEYS, weight=0.7)
    before = projected(ahead)
    assert same_picture(stock, ahead)
    assert projected(ahead) == before + 1
    # this scale holds inside the UNet only
    assert same_picture(stock, ahead, cross_attention_kwargs={"scale": 0.5})
    assert projected(ahead) == before + 1
    for pipe in (stock, ahead):
        unload(pipe)
    assert same_picture(stock, ahead)
    assert projected(ahead) == before + 2


def test_the_text_encoder_runs_before_anything_is_prepared(monkeypatch):
    """What a call begins with is done while the GPU waits; after the text encoder was launched it does not."""
    stock, ahead = twins()
    order = []
    prepare = PromptCall.prepare
    monkeypatch.setattr(PromptCall, "prepare", lambda self: order.append("prepare") or prepare(self))
    handle = ahead.text_encoder.register_forward_hook(lambda *_: order.append("encode"))
    assert same_picture(stock, ahead)
    handle.remove()
    assert order == ["encode", "encode", "prepare"]


def test_fused_projections():
    stock, ahead = twins()
    ahead.fuse_qkv_projections()
    turbo(stock).fuse_qkv_projections()
    assert same_picture(stock, ahead)
    assert projected(ahead) == 1
    ahead.unfuse_qkv_projections()
    stock.unfuse_qkv_projections()
    assert same_picture(stock, ahead)


def test_a_prompt_as_wide_as_its_projections():
    """One cross-attention layer of 16 channels: keys and values are 32 wide, as the prompt is."""

    def make() -> Any:
        pipe = tiny.sd()
        torch.manual_seed(1)
        pipe.unet = tiny.unet(
            block_out_channels=(16, 16),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            mid_block_type=None,
        )
        return pipe

    stock, ahead = twins(make)
    assert same_picture(stock, ahead)
    assert projected(ahead) == 1
    context = torch.randn(2, 5, tiny.CONTEXT)
    sample = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        assert torch.equal(ahead.unet(sample, 7, context).sample, stock.unet(sample, 7, context).sample)


@pytest.mark.parametrize("task", ["img2img", "inpaint"])
def test_other_tasks(task):
    stock = for_task(tiny.sd(), task)
    ahead = turbo(for_task(tiny.sd(), task))
    ahead.enable_prompt_projections()
    inputs = {"prompt": "red cat", "num_inference_steps": 3, "output_type": "pt", **task_inputs(task, 64, 64, 1)}
    pictures = [pipe(**inputs, generator=torch.Generator().manual_seed(0)).images for pipe in (stock, ahead)]
    assert torch.equal(*pictures)
    assert projected(ahead) == 1


@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
def test_controlnets(several):
    stock, ahead = controlled(several), turbo(controlled(several))
    ahead.enable_prompt_projections()
    assert torch.equal(controlled_picture(ahead), controlled_picture(stock))
    nets = ahead.controlnet.nets if several else [ahead.controlnet]
    assert [net._compiled_call_impl.made for net in (ahead.unet, *nets)] == [1] * (1 + len(nets))


def test_inference_mode_and_gradients():
    stock, ahead = twins()
    with torch.inference_mode():
        assert same_picture(stock, ahead)
    assert projected(ahead) == 0  # changes of inference tensors can't be noticed
    sample, context = torch.randn(1, 4, 8, 8), torch.randn(1, 5, tiny.CONTEXT, requires_grad=True)
    ahead.unet(sample, 7, context).sample.sum().backward()
    assert context.grad is not None


def test_processors_it_does_not_know_are_left_to_project_themselves():
    stock, ahead = twins()
    for pipe in (stock, ahead):
        found = pipe.unet.attn_processors
        pipe.unet.set_attn_processor({name: Scaled(processor) for name, processor in found.items()})
    assert same_picture(stock, ahead)
    assert projected(ahead) == 0
    assert "not ahead: " in str(ahead.turbo_report())


@pytest.mark.parametrize(
    "carry", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))], ids=["copy", "pickle"]
)
def test_copies_have_their_own(carry):
    stock, ahead = twins()
    expected = tiny.picture(stock)
    copied = carry(ahead)
    assert torch.equal(tiny.picture(copied), expected)
    assert projected(copied) == 1
    assert projected(ahead) == 0
    before = state_of(ahead)
    copied.turbo_undo()
    assert differences(before, state_of(ahead)) == []
    assert torch.equal(tiny.picture(ahead), expected)
    assert torch.equal(tiny.picture(copied), expected)


def test_undo_leaves_a_foreign_forward_alone():
    _, ahead = twins()
    attn = ahead.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    theirs = attn.to_k.forward = lambda x: torch.zeros(*x.shape[:2], attn.inner_kv_dim)
    report = ahead.turbo_undo()
    assert attn.to_k.forward is theirs
    assert "1 layers got another forward meanwhile" in report.left_alone


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (tiny.pixart, "what a PixArtTransformer2DModel does with its prompt is not known"),
        ("text_proj", "sends its prompt through encoder_hid_proj first"),
    ],
)
def test_refusals(make, found):
    if make == "text_proj":
        pipe = tiny.sd()
        pipe.unet = tiny.unet(encoder_hid_dim=tiny.CONTEXT, encoder_hid_dim_type="text_proj")
    else:
        pipe = make()
    pipe = turbo(pipe)
    before = state_of(pipe)
    with pytest.raises(NotSupportedError, match=f"enable_prompt_projections.*{found}.*What to do"):
        pipe.enable_prompt_projections()
    assert differences(before, state_of(pipe)) == []


@pytest.mark.slow
def test_under_a_compiler_in_one_graph():
    dynamo.reset()
    stock, ahead = twins(micro.sd)
    ahead.compile_unet(backend="eager", fullgraph=True)
    assert same_picture(stock, ahead)
    assert projected(ahead) == 1
    dynamo.reset()


def test_with_a_lora_loaded_before():
    stock, ahead = tiny.sd(), turbo(tiny.sd())
    for pipe in (stock, ahead):
        lora(pipe)
    ahead.enable_prompt_projections()
    assert same_picture(stock, ahead)
    assert projected(ahead) == 1
