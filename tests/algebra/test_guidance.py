"""The first layers once for both halves of guidance: only where both are equal, and then the same picture."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import diffusers
import pytest
import torch

from diffusers_turbo import turbo
from diffusers_turbo.actions.guidance import OnOneHalf
from diffusers_turbo.bench.tasks import for_task, task_inputs
from diffusers_turbo.errors import NotSupportedError
from diffusers_turbo.parity import distance
from diffusers_turbo.planning.options import DOUBLING_PIPELINES
from tests import tiny
from tests.algebra.changing import between_steps, no_more_guidance
from tests.controlled import controlled, controlled_picture
from tests.state import differences, state_of

SAME_DB = 110  # a batch of another size may be summed in another order


def twins() -> tuple[Any, Any]:
    """A stock pipeline, and its equal with what both halves of guidance share computed once."""
    shared = turbo(tiny.sd())
    shared.enable_shared_guidance()
    return tiny.sd(), shared


def near(stock: Any, shared: Any, **arguments: Any) -> bool:
    arguments = {"steps": 3, **arguments}
    return distance(tiny.picture(shared, **arguments), tiny.picture(stock, **arguments)).psnr_db >= SAME_DB


def rows_seen(pipe: Any, monkeypatch: Any, **arguments: Any) -> dict[str, set[int]]:
    """How many samples each shared module was given in one call of the pipeline."""
    seen: dict[str, set[int]] = {}
    run = OnOneHalf._forward

    def spy(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.setdefault(type(self.module).__name__, set()).add(x.shape[0])
        return run(self, x, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(OnOneHalf, "_forward", spy)
        tiny.picture(pipe, **arguments)
    return seen


def make(name: str) -> Any:
    cls = getattr(diffusers, name)
    if "ControlNet" in name:
        return controlled(cls=cls)
    return for_task(
        tiny.sd(), {"Img2": "img2img", "Inpa": "inpaint"}.get(name.removeprefix("StableDiffusion")[:4], "txt2img")
    )


def run(pipe: Any, **arguments: Any) -> torch.Tensor:
    """Two pictures with whatever the pipeline needs."""
    name, size = type(pipe).__name__, {"height": 32, "width": 32}
    pictures = task_inputs("inpaint" if "Inpaint" in name else "img2img", **size, batch=2)
    given: dict[str, Any] = {"prompt": ["red cat", "dog"], "num_inference_steps": 3, "output_type": "pt"}
    if "Img2Img" in name or "Inpaint" in name:
        given |= pictures
    if "ControlNet" in name:
        given["control_image" if "image" in given else "image"] = pictures["image"]
    if "Img2Img" not in name or "ControlNet" in name:
        given |= size
    given |= arguments
    return pipe(**given, generator=torch.Generator().manual_seed(0)).images


@pytest.mark.parametrize("name", DOUBLING_PIPELINES)
def test_these_pipelines_double_their_latents(name):
    """What the switch relies on, seen from outside: under guidance the UNet's input is two equal halves."""
    pipe, samples = make(name), []
    pipe.unet.register_forward_pre_hook(lambda module, args: samples.append(args[0].clone()))
    stock = run(pipe)
    assert len(samples) == 3
    for sample in samples:
        first, second = sample.chunk(2)
        assert sample.shape[0] == 4
        assert torch.equal(first, second)
        assert not torch.equal(first[0], first[1])
    shared = turbo(make(name))
    shared.enable_shared_guidance()
    assert distance(run(shared), stock).psnr_db >= SAME_DB
    assert "3 of 3 calls of the UNet had two equal halves" in str(shared.turbo_report())


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_half_the_work_under_guidance_all_of_it_without(batch, monkeypatch):
    stock, shared = twins()
    assert near(stock, shared, batch=batch)
    assert rows_seen(shared, monkeypatch, batch=batch) == {"ResnetBlock2D": {batch}, "Attention": {batch}}
    # without guidance the batch holds different pictures, in the same shapes
    assert near(stock, shared, batch=2 * batch, guidance_scale=1.0)
    without = rows_seen(shared, monkeypatch, batch=2 * batch, guidance_scale=1.0)
    assert without == {"ResnetBlock2D": {2 * batch}, "Attention": {2 * batch}}


def test_halves_taken_for_equal_that_are_not_would_give_another_picture(monkeypatch):
    """The test above can fail: with a flag that lies, the second picture is the first one's."""
    stock, shared = twins()
    monkeypatch.setattr(type(shared), "do_classifier_free_guidance", property(lambda pipe: True))
    call = shared.unet._compiled_call_impl
    sample, context = torch.randn(2, 4, 8, 8), torch.randn(2, 5, tiny.CONTEXT)
    call.pipe = shared
    with torch.no_grad():
        assert not torch.allclose(
            shared.unet(sample, 7, context).sample, stock.unet(sample, 7, context).sample, atol=1e-3
        )


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
def test_guidance_ended_by_a_callback(graphs, captures_on_the_cpu):
    stock, shared = twins()
    if graphs:
        shared.enable_cuda_graphs()
    for _ in range(2):
        assert near(stock, shared, steps=4, batch=2, **between_steps(no_more_guidance))
    assert near(stock, shared, batch=2)


def test_graphs_of_both_modes_are_kept_apart(captures_on_the_cpu):
    """One picture under guidance and two without have the same shapes, and must not replay each other's graph."""
    stock, shared = twins()
    shared.enable_cuda_graphs()
    for _ in range(2):
        assert near(stock, shared, batch=1)
        assert near(stock, shared, batch=2, guidance_scale=1.0)
    assert "UNet2DConditionModel: 2 captured, 2 kept" in str(shared.turbo_report())


def test_a_call_of_the_unet_alone_is_left_as_it_is():
    stock, shared = twins()
    sample, context = torch.randn(2, 4, 8, 8), torch.randn(2, 5, tiny.CONTEXT)
    with torch.no_grad():
        assert torch.equal(shared.unet(sample, 7, context).sample, stock.unet(sample, 7, context).sample)


@pytest.mark.parametrize("how", ["copy", "pickle"])
def test_copies_have_their_own(how):
    stock, shared = twins()
    copied = copy.deepcopy(shared) if how == "copy" else pickle.loads(pickle.dumps(shared))
    before = state_of(shared)
    assert near(stock, copied)
    assert copied.unet._compiled_call_impl.shared == 3
    assert shared.unet._compiled_call_impl.shared == 0
    copied.turbo_undo()
    assert differences(before, state_of(shared)) == []
    assert torch.equal(tiny.picture(copied), tiny.picture(stock))


def test_effect_undo_and_twice():
    pipe = turbo(tiny.sd())
    stock, before = tiny.picture(pipe), state_of(pipe)
    pipe.enable_shared_guidance()
    pipe.enable_shared_guidance()
    assert len(pipe.turbo_report().levers) == 1
    pipe.disable_shared_guidance()
    assert differences(before, state_of(pipe)) == []
    assert torch.equal(tiny.picture(pipe), stock)


def test_together_with_the_projected_prompt_and_graphs(captures_on_the_cpu):
    stock, shared = twins()
    shared.enable_cuda_graphs()
    shared.enable_prompt_projections()
    for seed in range(2):
        assert near(stock, shared, seed=seed, batch=2)
    told = str(shared.turbo_report())
    assert "6 of 6 calls" in told
    assert "6 calls, computed ahead 2 times" in told
    assert "1 captured, 1 kept, 5 replays" in told
    shared.disable_cuda_graphs()
    assert near(stock, shared, batch=2)


class OwnCall(diffusers.StableDiffusionPipeline):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs)


def other_pipelines() -> dict[str, Any]:
    base = tiny.sd()
    odd = tiny.sd()
    odd.unet = tiny.unet(class_embed_type="timestep")
    parts = {name: part for name, part in base.components.items() if name != "requires_safety_checker"}
    return {
        "StableDiffusionXLPipeline calls its denoiser": tiny.sdxl(),
        "PixArtAlphaPipeline calls its denoiser": tiny.pixart(),
        "OwnCall calls its denoiser": OwnCall(**parts, requires_safety_checker=False),
        "class_embed_type": odd,
    }


@pytest.mark.parametrize("found", other_pipelines())
def test_refusals(found):
    pipe = turbo(other_pipelines()[found])
    before = state_of(pipe)
    with pytest.raises(NotSupportedError, match=f"enable_shared_guidance.*{found}.*What to do"):
        pipe.enable_shared_guidance()
    assert differences(before, state_of(pipe)) == []


def test_a_first_level_without_attention_shares_its_resnet():
    pipe, stock = tiny.sd(), tiny.sd()
    for each in (pipe, stock):
        torch.manual_seed(3)
        each.unet = tiny.unet(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")
        )
    shared = turbo(pipe)
    shared.enable_shared_guidance()
    assert near(stock, shared, batch=2)
    assert "once for both halves: unet.down_blocks.0.resnets.0\n" in str(shared.turbo_report())


def test_a_controlnet_beside_it():
    shared = turbo(controlled())
    shared.enable_shared_guidance()
    assert distance(controlled_picture(shared), controlled_picture(controlled())).psnr_db >= SAME_DB
