"""Other tasks over the same models: nothing copied or cast, every step run, the input picture used."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffusers_turbo.bench.tasks import TASKS, for_task, size_inputs, task_inputs
from diffusers_turbo.errors import InvalidOptionError, NotSupportedError
from tests.bench import shrunk

WITH_ALL_TASKS = ["sd15", "sdxl", "sd3", "flux"]


@pytest.mark.parametrize("name", WITH_ALL_TASKS)
def test_a_task_shares_the_models_and_casts_nothing(name):
    pipe = shrunk.build(name, dtype=torch.float16, device="meta")
    pipe.vae.to(torch.bfloat16)
    dtypes = _dtypes(pipe)
    for task, part_of_name in (("img2img", "Img2Img"), ("inpaint", "Inpaint")):
        made = for_task(pipe, task)
        assert part_of_name in type(made).__name__
        assert made.components.keys() >= pipe.components.keys()
        assert all(made.components[key] is part for key, part in pipe.components.items())
        assert _dtypes(pipe) == dtypes
        assert made._progress_bar_config == {"disable": True}


@pytest.mark.parametrize("task", ["img2img", "inpaint"])
@pytest.mark.parametrize("name", WITH_ALL_TASKS)
def test_a_task_runs_every_step_at_the_size_asked_for(name, task):
    pipe = for_task(shrunk.ready(name), task)
    steps = []
    pictures = shrunk.picture(
        pipe,
        ["A photo"] * 2,
        **task_inputs(task, 48, 64, 2),
        **size_inputs(pipe, 48, 64),
        callback_on_step_end=lambda _pipe, step, _timestep, tensors: steps.append(step) or tensors,
    )
    assert pictures.shape == (2, 3, 48, 64)
    assert pictures.isfinite().all()
    # PLMS evaluates its second step twice
    assert len(steps) == len(pipe.scheduler.timesteps) == (3 if name == "sd15" else 2)


def test_the_picture_and_the_mask_are_used():
    pipe = for_task(shrunk.ready("sd15"), "inpaint")
    inputs = task_inputs("inpaint", 64, 64, 1)
    first = shrunk.picture(pipe, **inputs, height=64, width=64)
    inverted = {
        key: [image.point(lambda value: 255 - value) for image in inputs[key]] for key in ("image", "mask_image")
    }
    for key, images in inverted.items():
        assert not torch.equal(shrunk.picture(pipe, **inputs | {key: images}, height=64, width=64), first), key


def test_inputs_are_the_same_each_time():
    assert task_inputs("txt2img", 64, 64, 1) == {}
    once, again = (task_inputs("inpaint", 48, 64, 3) for _ in range(2))
    assert len(once["image"]) == len(once["mask_image"]) == 3
    assert once["image"][0].size == once["mask_image"][0].size == (64, 48)
    assert once["image"][0].mode == "RGB"
    assert set(np.unique(once["mask_image"][0])) == {0, 255}
    for key in ("image", "mask_image"):
        assert np.array_equal(once[key][0], again[key][0])


def test_sizes_go_to_the_calls_that_take_them():
    sd, flux = (shrunk.build(name, device="meta", text_encoders=False) for name in ("sd15", "flux"))
    both = {"height": 48, "width": 64}
    assert size_inputs(sd, 48, 64) == both
    assert size_inputs(sd, None, 64) == {"width": 64}
    assert size_inputs(for_task(sd, "img2img"), 48, 64) == {}
    assert size_inputs(for_task(sd, "inpaint"), 48, 64) == both
    assert size_inputs(for_task(flux, "img2img"), 48, 64) == both


def test_text_to_image_is_the_pipeline_itself(pipe):
    assert for_task(pipe, "txt2img") is pipe


def test_what_there_is_no_pipeline_for_is_refused(pipe, pixart_pipe):
    with pytest.raises(NotSupportedError, match=r"found no inpaint pipeline for PixArtAlphaPipeline.*with txt2img"):
        for_task(pixart_pipe, "inpaint")
    with pytest.raises(NotSupportedError, match="an object of type dict"):
        for_task({}, "img2img")
    with pytest.raises(InvalidOptionError, match="task = 'img2image'.*did you mean 'img2img'"):
        for_task(pipe, "img2image")
    with pytest.raises(InvalidOptionError, match=f"one of {', '.join(TASKS)}.*choose one of these"):
        task_inputs("video", 64, 64, 1)


def _dtypes(pipe) -> list[torch.dtype]:
    modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    return [parameter.dtype for module in modules for parameter in module.parameters()]
