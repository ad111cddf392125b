"""Where the time goes: a step's kernels by family and one by one, its trace for Chrome's viewer, the GPU's waits."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from ..errors import NotSupportedError, explain_failure
from .clock import synchronize
from .families import describe, kernels_of
from .running import Contender
from .waits import describe_waits, watch
from .writing import write_whole

ROWS = 40
"""Lines of the table."""

KERNELS, TRACE, WAITS = "-kernels.txt", "-trace.json", "-waits.txt"
"""How the names of the files end."""

STEPS = 6
"""Of the call whose waits are told: what comes before and after the steps is the same with more."""


def trace_step(contender: Contender, folder: Path) -> tuple[Path, Path]:
    """Profile the second denoising step of a call and write `NAME-kernels.txt` and `NAME-trace.json` into a folder.

    The first step is left out, since schedulers and kernels prepare themselves in it. Warm the contender up before.

    Raises:
        NotSupportedError: the pipeline offers no callback between steps, or makes fewer than two.
        InvalidOptionError: the folder cannot be written to.
    """
    if "callback_on_step_end" not in inspect.signature(type(contender.pipe).__call__).parameters:
        raise _cannot(contender, "a pipeline without callback_on_step_end")
    cuda = contender.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    profiler = profile(activities=activities, acc_events=True)
    seen: list[int] = []

    def between(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        synchronize(contender.device)
        seen.append(step)
        if len(seen) == 1:
            profiler.start()
        elif len(seen) == 2:
            profiler.stop()
        return tensors

    call = contender.call(contender.job.batches[0], callback_on_step_end=between)
    try:
        call()
    finally:
        if len(seen) == 1:  # a profiler left on would slow down everything after it
            profiler.stop()
    if len(seen) < 2:
        raise _cannot(contender, f"{len(seen)} step")
    order = "self_device_time_total" if cuda else "self_cpu_time_total"
    table = profiler.key_averages().table(sort_by=order, row_limit=ROWS, max_name_column_width=90)
    name = contender.case.name
    kernels, chrome = folder / f"{name}{KERNELS}", folder / f"{name}{TRACE}"
    parts = filter(None, (f"{name}: one denoising step, by {order}", describe(kernels_of(profiler)), table))
    write_whole(kernels, "\n\n".join(parts) + "\n", "the kernel table")
    part = chrome.with_name(f".{chrome.name}.{os.getpid()}.part")
    try:
        profiler.export_chrome_trace(str(part))
        os.replace(part, chrome)
    finally:
        part.unlink(missing_ok=True)
    return kernels, chrome


def trace_waits(contender: Contender, folder: Path) -> Path:
    """Write into `NAME-waits.txt` what the host did while the GPU had nothing to do, in a call of a few steps.

    Warm the contender up before.

    Raises:
        InvalidOptionError: the folder cannot be written to.
    """
    steps = min(STEPS, contender.job.steps)
    call = contender.call(contender.job.batches[0], num_inference_steps=steps)
    for _ in range(2):  # what is made for so many steps at once is recorded at its second sight
        call()
    text = describe_waits(watch(call, contender.device))
    path = folder / f"{contender.case.name}{WAITS}"
    write_whole(path, f"{contender.case.name}, {steps} steps: {text}\n", "the waits")
    return path


def _cannot(contender: Contender, found: str) -> NotSupportedError:
    tried = f"tracing one step of {contender.case.name}"
    return NotSupportedError(
        explain_failure(tried, found, "two steps with a callback between them", "leave --trace out")
    )
