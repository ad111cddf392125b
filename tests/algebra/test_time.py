"""Time projections of all steps from one table: the eager picture whatever is changed, and the work promised."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler, UniPCMultistepScheduler
from torch.overrides import TorchFunctionMode

from diffusers_turbo import turbo
from diffusers_turbo.actions.stripes import State
from diffusers_turbo.bench.tasks import for_task, task_inputs
from diffusers_turbo.errors import NotSupportedError
from diffusers_turbo.parity import distance
from tests import tiny
from tests.algebra.changing import between_steps, lora_on, no_more_guidance
from tests.state import differences, state_of

SAME_DB = 110  # products of other sizes may be summed in another order


def twins(make: Any = tiny.sd) -> tuple[Any, Any]:
    """A stock pipeline, and its equal with the time projected ahead."""
    ahead = turbo(make())
    ahead.enable_time_projections()
    return make(), ahead


def made(pipe: Any) -> int:
    return pipe.unet._compiled_call_impl.made


def near(stock: Any, ahead: Any, **arguments: Any) -> bool:
    arguments = {"steps": 4, "batch": 2, **arguments}
    return distance(tiny.picture(ahead, **arguments), tiny.picture(stock, **arguments)).psnr_db >= SAME_DB


class Rows(TorchFunctionMode):
    """Notes the first dimension of what goes through one linear layer."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight, self.seen = weight, []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.linear and args[1] is self.weight:
            self.seen.append(args[0].shape[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("make", [tiny.sd, tiny.sdxl])
def test_each_projection_runs_once_a_call_for_all_steps(make):
    stock, ahead = twins(make)
    assert near(stock, ahead)
    parts = ["mid_block.resnets.0.time_emb_proj", "time_embedding.linear_2"]
    parts += ["add_embedding.linear_1"] if make is tiny.sdxl else []
    for part in parts:
        with Rows(ahead.unet.get_submodule(part).weight) as rows:
            tiny.picture(ahead, steps=5)
        assert rows.seen == [2 if part.startswith("add") else 5]
        with Rows(stock.unet.get_submodule(part).weight) as rows:
            tiny.picture(stock, steps=5)
        assert rows.seen == [2] * 5


@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, UniPCMultistepScheduler])
@pytest.mark.parametrize("loop", [False, True], ids=["host's loop", "sync-free"])
def test_other_schedulers(scheduler, loop):
    def make() -> Any:
        pipe = tiny.sd()
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
        return pipe

    stock, ahead = twins(make)
    if loop:
        ahead.enable_sync_free_loop()
    assert near(stock, ahead)
    assert near(stock, ahead, steps=6)
    assert made(ahead) == 2


def weights_in_place(pipe: Any, kwargs: dict[str, Any]) -> None:
    with torch.no_grad():
        pipe.unet.mid_block.resnets[0].time_emb_proj.weight.mul_(3)


def embedding_exchanged(pipe: Any, kwargs: dict[str, Any]) -> None:
    linear = pipe.unet.time_embedding.linear_1
    linear.weight.data = linear.weight.data * 2


def timesteps_in_place(pipe: Any, kwargs: dict[str, Any]) -> None:
    pipe.scheduler.timesteps[2:] -= 7


BETWEEN_STEPS = {
    "weights in place": weights_in_place,
    "weights exchanged": embedding_exchanged,
    "timesteps in place": timesteps_in_place,
    "a LoRA loaded": lambda pipe, kwargs: lora_on(pipe, "time_emb_proj"),
    "guidance ended": no_more_guidance,
}


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("change", BETWEEN_STEPS)
def test_a_callback_may_change_anything_between_two_steps(change, graphs, captures_on_the_cpu):
    stock, ahead = twins()
    if graphs:
        ahead.enable_cuda_graphs()
        assert near(stock, ahead)
    assert near(stock, ahead, **between_steps(BETWEEN_STEPS[change]))
    assert near(stock, ahead)


def test_sdxls_added_conditions_between_two_steps():
    def smaller(pipe: Any, kwargs: dict[str, Any]) -> None:
        kwargs["add_time_ids"] = kwargs["add_time_ids"] / 2
        kwargs["add_text_embeds"] = kwargs["add_text_embeds"].flip(0)

    stock, ahead = twins(tiny.sdxl)
    plain = tiny.picture(ahead, steps=4)
    callback = between_steps(smaller, "add_time_ids", "add_text_embeds")
    assert near(stock, ahead, **callback)
    assert not torch.allclose(tiny.picture(ahead, steps=4, **callback), plain, atol=1e-3)


@pytest.mark.parametrize("make", [tiny.sd, tiny.sdxl])
def test_conditions_that_the_time_has_nothing_to_do_with(make):
    stock, ahead = twins(make)
    assert near(stock, ahead, batch=1, ip_adapter_image_embeds=[torch.zeros(2, 1, 8)])
    assert made(ahead) == 1


def test_without_the_state_a_stale_table_would_be_used(monkeypatch):
    """The tests above can fail: with nothing watched, the picture is wrong."""
    monkeypatch.setattr(State, "now", lambda self: ())
    stock, ahead = twins()
    assert not near(stock, ahead, **between_steps(weights_in_place))


def test_a_lora_on_the_projections():
    stock, ahead = twins()
    for pipe in (stock, ahead):
        lora_on(pipe, "time_emb_proj", weight=0.6)
    assert near(stock, ahead)
    assert made(ahead) == 1
    assert near(stock, ahead, cross_attention_kwargs={"scale": 0.5})
    for pipe in (stock, ahead):
        pipe.unet.delete_adapters("default")
    assert near(stock, ahead)


@pytest.mark.parametrize("task", ["img2img", "inpaint"])
def test_tasks_that_begin_in_the_middle(task):
    stock, ahead = for_task(tiny.sd(), task), turbo(for_task(tiny.sd(), task))
    ahead.enable_time_projections()
    inputs = {"prompt": "red cat", "num_inference_steps": 6, "output_type": "pt", **task_inputs(task, 64, 64, 1)}
    inputs["strength"] = 0.5
    pictures = [pipe(**inputs, generator=torch.Generator().manual_seed(0)).images for pipe in (stock, ahead)]
    assert distance(pictures[1], pictures[0]).psnr_db >= SAME_DB
    assert made(ahead) == 1


def test_calls_of_the_unet_alone_and_timesteps_of_ones_own():
    stock, ahead = twins()
    sample, context = torch.randn(2, 4, 8, 8), torch.randn(2, 5, tiny.CONTEXT)
    with torch.no_grad():
        for timestep in (7, 7.5, torch.tensor(7), torch.tensor([7, 9])):
            assert torch.equal(
                ahead.unet(sample, timestep, context).sample, stock.unet(sample, timestep, context).sample
            )
    assert made(ahead) == 0


def test_an_embedding_as_wide_as_all_projections():
    """Two resnets of 16 channels and an embedding of 32: the table would be as wide as the embedding."""

    def make() -> Any:
        pipe = tiny.sd()
        torch.manual_seed(1)
        pipe.unet = tiny.unet(
            block_out_channels=(8, 8),
            time_embedding_dim=40,
            down_block_types=("CrossAttnDownBlock2D",) * 2,
            up_block_types=("UpBlock2D",) * 2,
            norm_num_groups=4,
            mid_block_type=None,
            attention_head_dim=2,
        )
        return pipe

    stock, ahead = twins(make)
    widths = [m.time_emb_proj.out_features for m in ahead.unet.modules() if hasattr(m, "time_emb_proj")]
    assert sum(widths) in (40, 48)
    assert near(stock, ahead)


@pytest.mark.parametrize("how", ["copy", "pickle"])
def test_copies_have_their_own(how):
    stock, ahead = twins()
    copied = copy.deepcopy(ahead) if how == "copy" else pickle.loads(pickle.dumps(ahead))
    before = state_of(ahead)
    assert near(stock, copied)
    assert (made(copied), made(ahead)) == (1, 0)
    copied.turbo_undo()
    assert differences(before, state_of(ahead)) == []
    assert torch.equal(tiny.picture(copied), tiny.picture(stock))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"time_cond_proj_dim": 8}, "embeds more than its time (time_cond_proj_dim)"),
        ({"class_embed_type": "timestep"}, "embeds more than its time (class_embed_type)"),
        ({}, "a ResnetBlock2D takes the time in a way of its own"),
    ],
)
def test_refusals(change, found):
    pipe = tiny.sd()
    pipe.unet = tiny.unet(**change)
    pipe.unet.mid_block.resnets[0].skip_time_act = not change
    pipe = turbo(pipe)
    before = state_of(pipe)
    with pytest.raises(NotSupportedError) as error:
        pipe.enable_time_projections()
    assert found in str(error.value)
    assert "What to do: leave this switch off" in str(error.value)
    assert differences(before, state_of(pipe)) == []


def test_a_transformer_is_refused():
    with pytest.raises(NotSupportedError, match="how a PixArtTransformer2DModel embeds its time is not known"):
        turbo(tiny.pixart()).enable_time_projections()


@pytest.mark.parametrize("make", [tiny.sd, tiny.sdxl])
def test_with_everything_else_that_spares_work(make, captures_on_the_cpu):
    stock, ahead = twins(make)
    for switch in ("enable_channels_last", "enable_pointwise_matmul", "enable_prompt_projections"):
        getattr(ahead, switch)()
    if make is tiny.sd:
        ahead.enable_shared_guidance()
    ahead.fuse_qkv_projections()
    ahead.enable_sync_free_loop()
    ahead.enable_cuda_graphs()
    before = tiny.picture(stock, steps=4)
    for seed in range(3):
        assert near(stock, ahead, seed=seed)
    assert "UNet2DConditionModel: 1 captured, 1 kept, 11 replays" in str(ahead.turbo_report())
    assert ahead.turbo_undo().left_alone == ()
    assert torch.equal(tiny.picture(ahead, steps=4), before)
