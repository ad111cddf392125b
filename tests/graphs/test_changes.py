"""Graphs give the eager picture whatever changes under them, with a capture that bakes in what a CUDA graph does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests import tiny
from tests.graphs.changing import CHANGES, in_place, lora, new_data, twin_pipes, unet_call
from tests.graphs.fake import FakeCapture


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


def test_a_lora_is_graphed():
    _, graphed = twin_pipes()
    lora(graphed)
    replayed = unet_call(graphed).replayed
    tiny.picture(graphed, steps=3)
    assert unet_call(graphed).replayed > replayed
