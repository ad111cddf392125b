"""From a job and a case to a pipeline on its device, with the case's switches thrown."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from diffusers import __version__ as diffusers_version
from packaging.version import Version

from ..entry import auto_optimize, turbo
from ..errors import InvalidOptionError, NotSupportedError, explain_failure, in_one_line
from ..facts.probing import require_device
from .cases import Case
from .job import ARCHITECTURE, Job
from .peers import PEERS
from .schedulers import set_scheduler
from .tasks import for_task

DTYPE_KEYWORD = "dtype" if Version(diffusers_version) >= Version("0.40") else "torch_dtype"
"""What `from_pretrained` calls the dtype to load in."""


def load_model(model: str, dtype: str, device: str) -> Any:
    """Return the pipeline of a folder, a Hub id or "arch:NAME", in `dtype` on `device`, quiet and untouched.

    Raises:
        InvalidOptionError: there is no such folder, model or architecture, or no such device here.
    """
    require_device(device)
    if model.startswith(ARCHITECTURE):
        from .architectures import build

        return build(model.removeprefix(ARCHITECTURE), dtype=getattr(torch, dtype), device=device)
    from diffusers import DiffusionPipeline

    looks_like_path = model.startswith((".", "/", "~")) or model.count("/") != 1
    folder = Path(model).expanduser()
    if not folder.is_dir() and (looks_like_path or folder.parent.is_dir()):
        raise _no_model(model, "no such folder")
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise _no_model(model, "a folder without model_index.json")
    try:
        with _quiet_loading():
            place = str(folder) if folder.is_dir() else model
            pipe = DiffusionPipeline.from_pretrained(place, **{DTYPE_KEYWORD: getattr(torch, dtype)})
    except (OSError, ValueError) as error:
        raise _no_model(model, in_one_line(error, 200)) from error
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def load_for(job: Job, case: Case) -> Any:
    """Return the untouched pipeline that a case of a job starts from.

    Raises:
        InvalidOptionError: the model, task or scheduler is none.
        NotSupportedError: task or scheduler do not fit the model.
    """
    pipe = load_model(job.model, case.dtype or job.dtype, job.device)
    if job.scheduler is not None:
        set_scheduler(pipe, job.scheduler)
    return for_task(pipe, job.task)


def apply_case(pipe: Any, case: Case, job: Job) -> Any:
    """Throw a case's switches on a pipeline, or let a plan throw them, and return it.

    Args:
        pipe: an untouched pipeline.
        case: what to switch on. One with nothing to switch on leaves the pipeline a plain diffusers one.
        job: the size and the steps, for plans.

    Raises:
        TurboError: a switch does not apply here, or a package is missing.
    """
    if case.auto is not None:
        given = {"device": job.device, "height": job.height, "width": job.width, "batch_size": max(job.batches)}
        given["steps"] = job.steps  # with few of them other ways of offload are the cheaper ones
        return auto_optimize(pipe, **{**given, **case.auto})
    if case.switches:
        turbo(pipe)
    for switch in case.switches:
        if not hasattr(pipe, switch.action):
            found, needed = f"no method {switch.action} on {type(pipe).__name__}", "a pipeline that has it"
            raise NotSupportedError(explain_failure(f"case {case.name}", found, needed, "leave the case out"))
        getattr(pipe, switch.action)(**switch.options)
    if case.peer is not None:
        PEERS[case.peer].apply(pipe)
    return pipe


def default_device() -> str:
    """Return the accelerator's name if there is one, else "cpu"."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _quiet_loading() -> contextlib.AbstractContextManager[Any]:
    """Hide diffusers' and transformers' own loading bars: this package shows one over the whole run."""
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    stack = contextlib.ExitStack()
    for logging in (diffusers_logging, transformers_logging):
        if logging.is_progress_bar_enabled():
            logging.disable_progress_bar()
            stack.callback(logging.enable_progress_bar)
    return stack


def _no_model(model: str, found: str) -> InvalidOptionError:
    needed = "a folder that save_pretrained() wrote, a model id of the Hugging Face Hub, or --arch"
    return InvalidOptionError(explain_failure(f"loading {model}", found, needed, "correct the path or the id"))
