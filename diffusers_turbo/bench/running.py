"""One case, loaded and ready: its calls, timed, with the peak of memory; and what became of it when it failed."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from ..errors import InvalidOptionError, MissingPackageError, NotSupportedError, explain_failure, in_one_line
from ..facts.pipeline import read_pipeline
from .busy import busy_seconds
from .cases import Case
from .clock import timed
from .job import Job
from .loading import apply_case, load_for
from .results import Row, Status
from .tasks import size_inputs, task_inputs


class Contender:
    """A case of a job with its pipeline in memory, ready to be called in its turn."""

    def __init__(self, job: Job, case: Case) -> None:
        """Load the pipeline and throw the case's switches.

        Raises:
            InvalidOptionError: there is no such model, or it makes no pictures of the size asked for.
            NotSupportedError: a switch does not apply, or not with these options.
            MissingPackageError: a switch needs a package that is not here.
        """
        self.job, self.case = job, case
        self.device = torch.device(job.device)
        before = self._allocated()
        self.load_s, self.pipe = timed(lambda: load_for(job, case), self.device)
        self.size = size_of(self.pipe, job)
        with _as_the_cases_own():
            self.apply_s, self.pipe = timed(lambda: apply_case(self.pipe, case, job), self.device)
        self.own_bytes = self._allocated() - before

    def call(self, batch: int, **more: Any) -> Callable[[], Any]:
        """Return one call of the pipeline as a user makes it, for a batch of pictures as tensors.

        What it is called with is made here, so that its making is not timed; `more` goes into the call as well.
        """
        job = self.job
        arguments = {
            "prompt": [job.prompt] * batch,
            "num_inference_steps": job.steps,
            "generator": torch.Generator().manual_seed(job.seed),
            "output_type": "pt" if job.decode else "latent",
            **({} if job.guidance_scale is None else {"guidance_scale": job.guidance_scale}),
            **size_inputs(self.pipe, job.height, job.width),
            **task_inputs(job.task, *self.size, batch),
            **more,
        }

        def call() -> Any:
            with self.autocast(), _as_the_cases_own():
                return self.pipe(**arguments)

        return call

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context of each call."""
        name = self.case.autocast
        return nullcontext() if name is None else torch.autocast(self.device.type, getattr(torch, name))

    def first(self, row: Row) -> None:
        """Make the first picture, compilation included, and note what it took."""
        before = self._allocated()
        row.load_s, row.apply_s = self.load_s, self.apply_s
        row.first_image_s, _ = timed(self.call(row.batch), self.device)
        # graphs and compiled code that stay are this case's own
        self.own_bytes += max(self._allocated() - before, 0)
        if hasattr(self.pipe, "turbo_report"):
            row.report = json.loads(self.pipe.turbo_report().to_json())

    def round(self, row: Row) -> float:
        """Make one timed call, return its seconds, and keep the highest peaks."""
        cuda, call = self.device.type == "cuda", self.call(row.batch)
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        before = self._allocated()
        seconds, _ = timed(call, self.device)
        if cuda:
            # what the other cases keep on the device is not this one's
            peak = torch.cuda.max_memory_allocated(self.device) - before + self.own_bytes
            row.peak_allocated_bytes = max(peak, row.peak_allocated_bytes or 0)
        if len(self.job.cases) == 1:  # whose they are cannot be told otherwise
            row.peak_host_bytes = max(peak_host_bytes() or 0, row.peak_host_bytes or 0) or None
            if cuda:
                reserved = torch.cuda.max_memory_reserved(self.device)
                row.peak_reserved_bytes = max(reserved, row.peak_reserved_bytes or 0)
        return seconds

    def profile(self, row: Row) -> None:
        """Note how long the GPU computes in one call."""

        def call(steps: int) -> Any:
            return self.call(row.batch, num_inference_steps=steps)()

        row.busy_s = busy_seconds(call, self.job.steps, self.device)

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0


def size_of(pipe: Any, job: Job) -> tuple[int, int]:
    """Return height and width in pixels of a job's pictures.

    Raises:
        InvalidOptionError: the model cannot make pictures of this size.
    """
    facts = read_pipeline(pipe)
    height, width = job.height or facts.default_height, job.width or facts.default_width
    if height % facts.size_multiple or width % facts.size_multiple:
        found, needed = f"{width}x{height}", f"multiples of {facts.size_multiple} for {type(pipe).__name__}"
        near = [max(round(side / facts.size_multiple), 1) * facts.size_multiple for side in (width, height)]
        raise InvalidOptionError(explain_failure("the size", found, needed, f"try --size {near[0]}x{near[1]}"))
    return height, width


def free_memory(device: torch.device) -> None:
    """Give back what Python and the allocator still hold."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def peak_host_bytes() -> int | None:
    """Return the most host memory this process has held, None on Windows."""
    if (status := Path("/proc/self/status")).is_file():
        # not ru_maxrss: Linux hands a parent's peak down to the process it starts
        lines = status.read_text(encoding="utf-8", errors="replace").splitlines()
        if (peak := next((line.split()[1] for line in lines if line.startswith("VmHWM:")), None)) is not None:
            return int(peak) * 1024
    try:
        import resource
    except ImportError:
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


@contextmanager
def outcomes_in(*rows: Row) -> Iterator[None]:
    """Turn a failure inside the block into the status and reason of these rows: it is a result, not the end.

    An InvalidOptionError concerns the whole run, such as a model that is not there, and goes on.
    """
    try:
        yield
    except InvalidOptionError:
        raise
    except Exception as error:
        status, reason = _classify(error)
        for row in rows:
            row.status, row.reason = status, reason


@contextmanager
def _as_the_cases_own() -> Iterator[None]:
    """Make options that this model does not take (slices of more heads than it has) a failure of one case only."""
    try:
        yield
    except InvalidOptionError as error:
        raise NotSupportedError(str(error)) from error


def _classify(error: Exception) -> tuple[Status, str]:
    text = " ".join(str(error).split())
    # torch raises a plain RuntimeError when host memory runs out
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in text:
        return Status.OUT_OF_MEMORY, text[:300] or type(error).__name__
    if isinstance(error, (NotSupportedError, MissingPackageError)):
        return Status.UNSUPPORTED, text
    return Status.FAILED, in_one_line(error)[:300]
