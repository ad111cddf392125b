"""What is said of memory, by whomever: the peak of each stage, what makes it up, and what must be free for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from .options import Options

if TYPE_CHECKING:
    from ..facts.pipeline import PipelineFacts

# What a plan keeps beyond the estimate: five times the largest shortfall over the measured rows, for what was not
# measured: other cards, other libraries, text encoders.
MARGIN = 0.10


GAPS_SHARE = 0.6
"""Of a margin of 5 %: SDXL ran out with 2.8 % more than what was predicted with all gaps, and other plans drew with as
little as 1.7 % more (`pytest tests/prediction/test_measured_plans.py`)."""


@dataclass(frozen=True, kw_only=True)
class StageMemory:
    """The estimated peak of one stage: "encode", "denoise" or "decode", and what makes it up."""

    stage: str
    weights_bytes: int
    activation_bytes: int
    workspace_bytes: int

    @property
    def peak_bytes(self) -> int:
        """Everything on the device at the stage's peak."""
        return self.weights_bytes + self.activation_bytes + self.workspace_bytes


def with_margin(peak_bytes: int, least_bytes: int, margin: float) -> int:
    """Return what must be free for a peak, and for what the allocator holds at the edge of a cap.

    The latter counts the gaps between blocks already, but where these lie hangs on the order of requests: a part of the
    margin is for that.
    """
    return max(int(peak_bytes * (1 + margin)), int(least_bytes * (1 + GAPS_SHARE * margin)))


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """The estimated peaks of all stages, in the order in which they run.

    `least_bytes` is what the allocator holds at least, gaps between blocks included, where that is known.
    """

    stages: tuple[StageMemory, ...]
    margin: float = MARGIN
    least_bytes: int = 0

    @property
    def peak(self) -> StageMemory:
        """The stage that needs most."""
        return max(self.stages, key=lambda stage: stage.peak_bytes)

    @property
    def peak_bytes(self) -> int:
        """The estimated peak over all stages."""
        return self.peak.peak_bytes

    @property
    def needed_bytes(self) -> int:
        """What must be free for the plan to be called fitting."""
        return with_margin(self.peak_bytes, self.least_bytes, self.margin)

    def stage(self, name: str) -> StageMemory:
        """Return one stage by name."""
        return next(stage for stage in self.stages if stage.stage == name)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MemoryEstimate:
        """Read back what `dataclasses.asdict` wrote."""
        return cls(**{**data, "stages": tuple(StageMemory(**stage) for stage in data["stages"])})


class Estimates(Protocol):
    """What answers for memory: `estimate_memory`, or a prediction from a run of the pipeline on the meta device."""

    def __call__(
        self,
        pipeline_facts: PipelineFacts,
        height: int,
        width: int,
        batch_size: int = 1,
        options: Sequence[Options] = (),
    ) -> MemoryEstimate:
        """Estimate the peak device memory of each stage."""
