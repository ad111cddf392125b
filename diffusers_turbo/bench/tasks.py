"""Text to image, image to image and inpainting over the same models, with input pictures made in code."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from ..errors import InvalidOptionError, NotSupportedError, explain_failure
from ..facts.pipeline import require_pipeline
from .job import TASKS
from .reading import what_to_choose

if TYPE_CHECKING:
    from PIL.Image import Image


def for_task(pipe: Any, task: str) -> Any:
    """Return the pipeline for a task: the same one for "txt2img", else a new one over the very same components.

    Give the plain pipeline: methods that `turbo()` added do not go over to a new one.

    Raises:
        InvalidOptionError: there is no such task.
        NotSupportedError: not a diffusers pipeline, or diffusers has no pipeline of this model for the task.
    """
    from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting

    _check(task, "for_task()")
    require_pipeline(pipe, f"for_task({task!r})")
    if task == "txt2img":
        return pipe
    auto: Any = {"img2img": AutoPipelineForImage2Image, "inpaint": AutoPipelineForInpainting}[task]
    try:
        # unlike DiffusionPipeline.from_pipe, these cast nothing to float32
        made = auto.from_pipe(pipe)
    except ValueError as error:
        raise NotSupportedError(
            explain_failure(
                f"for_task({task!r})",
                f"no {task} pipeline for {type(pipe).__name__} in diffusers",
                "a model that diffusers has one for, such as Stable Diffusion, SDXL, SD3 or Flux",
                "run this model with txt2img",
            )
        ) from error
    made.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
    return made


def task_inputs(task: str, height: int, width: int, batch: int) -> dict[str, Any]:
    """Return what a task's call needs beside the prompts: input pictures and masks in pixels, the same at every run.

    The strength is 1, so that all of the steps asked for are run; with less, a call skips the first ones.

    Raises:
        InvalidOptionError: there is no such task.
    """
    _check(task, "task_inputs()")
    if task == "txt2img":
        return {}
    inputs: dict[str, Any] = {"image": [_picture(height, width)] * batch, "strength": 1.0}
    if task == "inpaint":
        inputs["mask_image"] = [_mask(height, width)] * batch
    return inputs


def size_inputs(pipe: Any, height: int | None, width: int | None) -> dict[str, int]:
    """Return height and width as far as the pipeline's call takes them.

    Image to image of SD and SDXL takes its size from the picture; all other calls scale the picture to these, and to
    the model's own size where they are left out.
    """
    taken = inspect.signature(type(pipe).__call__).parameters
    sizes = {"height": height, "width": width}
    return {name: value for name, value in sizes.items() if name in taken and value is not None}


def _check(task: str, tried: str) -> None:
    if task not in TASKS:
        do = what_to_choose(task, TASKS, "choose one of these", most=1)
        raise InvalidOptionError(explain_failure(tried, f"task = {task!r}", f"one of {', '.join(TASKS)}", do))


def _picture(height: int, width: int) -> Image:
    """A colour gradient with a disc: smooth parts and an edge."""
    import numpy as np
    from PIL import Image

    rows, columns = np.ogrid[:height, :width]
    picture = np.zeros((height, width, 3), dtype=np.uint8)
    picture[..., 0] = 255 * rows // height
    picture[..., 1] = 255 * columns // width
    picture[..., 2] = 255 * _disc(height, width)
    return Image.fromarray(picture)


def _mask(height: int, width: int) -> Image:
    """White, to be painted anew, in the disc; black, to be kept, around it."""
    import numpy as np
    from PIL import Image

    return Image.fromarray(255 * _disc(height, width).astype(np.uint8))


def _disc(height: int, width: int) -> Any:
    """Boolean array `[H, W]`, true within a quarter of the shorter side from the centre."""
    import numpy as np

    rows, columns = np.ogrid[:height, :width]
    radius = min(height, width) // 4
    return (rows - height // 2) ** 2 + (columns - width // 2) ** 2 <= radius**2
