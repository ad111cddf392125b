"""Which estimate a plan rests on: the closed form where room is ample or hopeless, a prediction where it matters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..planning.estimate import MemoryEstimate
from ..planning.memory import estimate_memory
from ..planning.units import parse_bytes
from .predict import Predictor

if TYPE_CHECKING:
    from ..facts.device import DeviceFacts
    from ..facts.pipeline import PipelineFacts
    from ..planning.options import Options

PLENTY = 2
"""With room for so many times the estimate, or with so many times too little, no better one is needed.

Where it says too much it was 1.5 times the prediction at most, over all rungs of SD1.5 and SDXL at several sizes.
"""


class PredictWhereTight:
    """Answers for memory as `estimate_memory` does, and by a `Predictor` where that is near the room there is.

    Running the pipeline on the meta device takes seconds, which neither a first picture on a large card need wait for,
    nor one on a small card for ways whose weights alone have no room.
    """

    def __init__(self, pipe: Any, device: DeviceFacts, vram_budget: int | str | None) -> None:
        """Speak of `pipe` on `device`, within a budget or the memory that is free."""
        self.predictor = Predictor(pipe, device=device)
        limits = (parse_bytes(vram_budget, name="vram_budget"), device.free_bytes)
        self.room_bytes = min((limit for limit in limits if limit), default=0)

    def __call__(
        self,
        pipeline_facts: PipelineFacts,
        height: int,
        width: int,
        batch_size: int = 1,
        options: Sequence[Options] = (),
    ) -> MemoryEstimate:
        """Estimate the peak device memory of each stage."""
        estimate = estimate_memory(pipeline_facts, height, width, batch_size, options)
        weights = max(stage.weights_bytes for stage in estimate.stages)
        ample = estimate.needed_bytes * PLENTY <= self.room_bytes
        hopeless = weights > self.room_bytes or estimate.needed_bytes >= PLENTY * self.room_bytes
        if self.room_bytes and (ample or hopeless):
            return estimate
        return self.predictor.estimate(pipeline_facts, height, width, batch_size, options)
