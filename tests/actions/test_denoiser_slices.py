"""The denoiser's batch in slices: the picture of the batch, from so many samples at a time."""

from __future__ import annotations

import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

from diffusers_turbo import turbo
from diffusers_turbo.errors import InvalidOptionError, NotSupportedError
from diffusers_turbo.parity import distance
from tests import tiny
from tests.state import differences, state_of


@pytest.fixture
def batches():
    """Note how many samples each call of a network's forward has, by the network's class."""
    found: dict[str, list[int]] = {}

    def note(module, args, kwargs):
        first = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
        found.setdefault(type(module).__name__, []).append(len(first))

    found["hang"] = lambda module: module.register_forward_pre_hook(note, with_kwargs=True)
    return found


@pytest.mark.parametrize("make", [tiny.sd, tiny.sdxl, tiny.pixart])
@pytest.mark.parametrize(("slice_size", "batch", "seen"), [(1, 1, [1, 1]), (2, 2, [2, 2]), (4, 3, [4, 2]), (8, 2, [4])])
def test_the_picture_is_that_of_the_batch(make, slice_size, batch, seen, batches):
    pipe = turbo(make())
    stock, before = tiny.picture(pipe, batch=batch, steps=1), state_of(pipe)
    denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    hook = batches["hang"](denoiser)
    pipe.enable_denoiser_slicing(slice_size)
    ours = tiny.picture(pipe, batch=batch, steps=1)
    assert batches[type(denoiser).__name__] == seen
    assert distance(ours, stock).psnr_db > 100
    told = f"{int(len(seen) > 1)} of 1 calls in slices of {slice_size}"
    assert told in str(pipe.turbo_report())
    assert pipe.turbo_report().exact
    hook.remove()
    pipe.disable_denoiser_slicing()
    assert differences(before, state_of(pipe)) == []


def test_samples_keep_their_own_prompt_and_guidance():
    """A slice of another sample's rows would draw another picture."""
    pipe = turbo(tiny.sdxl())
    prompts = {"prompt": ["a red cat", "a blue dog"], "negative_prompt": ["bad", "ugly"]}
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    arguments = {"latents": latents, "num_inference_steps": 3, "height": 64, "width": 64, "output_type": "pt"}
    stock = pipe(**prompts, **arguments).images
    pipe.enable_denoiser_slicing()
    ours = pipe(**prompts, **arguments).images
    assert distance(ours, stock).psnr_db > 100
    assert distance(ours.flip(0), stock).psnr_db < 60


def test_controlnets_work_in_slices_too(batches):
    base = tiny.sd()
    controlnet = ControlNetModel.from_unet(base.unet, conditioning_embedding_out_channels=(8, 8, 16, 16)).eval()
    torch.manual_seed(3)
    for parameter in controlnet.parameters():  # what it adds begins as zeros
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=3.0)
    parts = {name: part for name, part in base.components.items() if name != "safety_checker"}
    pipe = turbo(
        StableDiffusionControlNetPipeline(
            **parts, controlnet=controlnet, safety_checker=None, requires_safety_checker=False
        )
    )
    pipe.set_progress_bar_config(disable=True)
    hint = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(4))
    arguments = {"image": hint, "height": 64, "width": 64, "steps": 2}
    stock = tiny.picture(pipe, **arguments)
    assert distance(tiny.picture(pipe, **{**arguments, "image": 1 - hint}), stock).psnr_db < 90
    for network in (pipe.unet, controlnet):
        batches["hang"](network)
    pipe.enable_denoiser_slicing()
    assert distance(tiny.picture(pipe, **arguments), stock).psnr_db > 100
    assert batches["UNet2DConditionModel"] == batches["ControlNetModel"] == [1] * 4
    guessed = tiny.picture(turbo(pipe), **arguments, guess_mode=True)
    pipe.disable_denoiser_slicing()
    assert distance(guessed, tiny.picture(pipe, **arguments, guess_mode=True)).psnr_db > 100


def test_what_may_not_belong_to_samples_is_not_cut(batches):
    pipe = turbo(tiny.sd())
    pipe.enable_denoiser_slicing()
    batches["hang"](pipe.unet)
    with torch.no_grad():
        arguments = (torch.ones(2, 4, 8, 8), 3, torch.ones(2, tiny.TOKENS, tiny.CONTEXT))
        pipe.unet(*arguments, cross_attention_kwargs={"mask": torch.ones(2, 1)})
        assert "which rows of its cross_attention_kwargs belong to which sample is not known" in str(
            pipe.turbo_report()
        )
        pipe.unet(*arguments, cross_attention_kwargs={"scale": 0.5})
    assert batches["UNet2DConditionModel"] == [2, 1, 1]


def test_beside_what_is_computed_ahead_and_offload(batches):
    """Rows of the time table and stripes of the prompt are cut with the samples; weights come for each slice."""
    for switch in ("computed", "offload"):
        pipe = turbo(tiny.sdxl())
        stock, before = tiny.picture(pipe, batch=2, steps=3), state_of(pipe)
        pipe.enable_denoiser_slicing(2)
        if switch == "computed":
            pipe.enable_time_projections()
            pipe.enable_prompt_projections()
        else:
            pipe.enable_partial_offload(700_000, device="cpu")
        for _ in range(2):
            assert distance(tiny.picture(pipe, batch=2, steps=3), stock).psnr_db > 100
        assert "6 of 6 calls in slices of 2" in str(pipe.turbo_report())
        pipe.turbo_undo()
        assert differences(before, state_of(pipe)) == []


@pytest.mark.parametrize("slice_size", [1, 2])
def test_beside_shared_guidance_each_sample_is_computed_by_itself(slice_size):
    """Of two pictures the first slice of two has no half of guidance in it twice."""
    pipe = turbo(tiny.sd())
    stock, before = tiny.picture(pipe, batch=2), state_of(pipe)
    pipe.enable_shared_guidance()
    pipe.enable_denoiser_slicing(slice_size)
    assert distance(tiny.picture(pipe, batch=2), stock).psnr_db > 100
    pipe.disable_denoiser_slicing()
    assert distance(tiny.picture(pipe, batch=2), stock).psnr_db > 100
    assert "2 of 2 calls of the UNet had two equal halves" in str(pipe.turbo_report())
    pipe.turbo_undo()
    assert differences(before, state_of(pipe)) == []


@pytest.mark.parametrize("slice_size", [0, -1, 1.5, True, None, "all"])
def test_a_slice_has_samples(slice_size):
    with pytest.raises(InvalidOptionError, match="slice_size"):
        turbo(tiny.sd()).enable_denoiser_slicing(slice_size)


def test_a_denoiser_that_is_not_known_is_refused():
    pipe = turbo(tiny.sd())
    pipe.unet.__class__ = type("OtherUNet", (type(pipe.unet),), {})
    with pytest.raises(NotSupportedError, match="a OtherUNet for its unet"):
        pipe.enable_denoiser_slicing()
