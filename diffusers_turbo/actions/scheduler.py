"""A denoising loop in which the host never waits for the device: the scheduler's methods, given host-side timesteps."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..errors import NotSupportedError, explain_failure
from ..planning.options import SyncFreeLoop
from ..schedulers.loop import HostLoop, LoopMethod
from ..schedulers.registry import LOOPS, refusals
from .undo import Journal, journaling

logger = logging.getLogger("diffusers_turbo")

TRIED = "enable_sync_free_loop()"


@dataclass
class SchedulerWatched:
    """Notices a scheduler that was put in its place meanwhile, and frees what a loop held when its call ends."""

    pipe: Any
    loop: HostLoop
    warned: bool = False

    def revert(self) -> str | None:
        """Leave another scheduler alone, and say so."""
        self.loop.staging.restart()
        return self._replaced()

    @contextmanager
    def around_call(self, pipe: Any) -> Iterator[None]:
        """Warn once that the switch is on a scheduler which is no longer the pipeline's."""
        if not self.warned and (sentence := self._replaced()):
            self.warned = True
            logger.warning("%s: %s; disable_sync_free_loop() and switch it on again to have it there", TRIED, sentence)
        try:
            yield
        finally:
            self.loop.staging.restart()

    def _replaced(self) -> str | None:
        now, ours = getattr(self.pipe, "scheduler", None), self.loop.scheduler
        if now is ours:
            return None
        return f"the pipeline's {type(ours).__name__} was replaced by another {type(now).__name__} meanwhile"


def apply(pipe: Any, options: SyncFreeLoop) -> Journal:
    """Exact: hand the scheduler timesteps from host memory, and noise through page-locked memory."""
    scheduler = getattr(pipe, "scheduler", None)
    if scheduler is None:
        found = f"a {type(pipe).__name__} without a scheduler"
        raise NotSupportedError(explain_failure(TRIED, found, "a pipeline with one", "leave this switch off"))
    if reasons := refusals(scheduler):
        needed = f"one of {', '.join(LOOPS)}, as diffusers made it"
        do = "set pipe.scheduler to one of these, or do without"
        raise NotSupportedError(explain_failure(TRIED, "; ".join(reasons), needed, do))
    loop = LOOPS[type(scheduler).__name__](scheduler)
    with journaling() as journal:
        for name in loop.methods:
            journal.set_attribute(scheduler, name, LoopMethod(loop, name))
        watched = SchedulerWatched(pipe, loop)
        journal.add(watched)
        journal.scopes.append(watched)
        journal.note(f"{type(scheduler).__name__}: {', '.join(loop.methods)}; a no-op for a pipeline on the CPU")
    return journal
