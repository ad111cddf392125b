"""The prediction: what each stage will need at its peak, what makes that up, and how sure it is. Data and text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..planning.estimate import MemoryEstimate, StageMemory, with_margin
from ..planning.units import gib
from .allocator import SETTINGS

FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class StagePeak:
    """One stage at the moment when most is allocated, in bytes.

    Attributes:
        stage: "encode", "vae_encode", "denoise" or "decode".
        allocated_bytes: what `torch.cuda.max_memory_allocated()` would say of the stage.
        reserved_bytes: what the allocator has taken from the driver by then, as `max_memory_reserved()`.
        least_bytes: what it takes from the driver at the edge of a cap, where it gives back first what is wholly free;
            which it does not while the denoiser's graph is recorded.
        weights_bytes, activation_bytes, workspace_bytes, graph_bytes: what was asked for, by purpose; a graph's own
            activations and workspaces are among `graph_bytes`.
        slack_bytes: what is allocated beyond what was asked for: the allocator gives whole blocks.
        estimated: why the stage is the closed-form estimate and not a run; empty where it was run.
    """

    stage: str
    allocated_bytes: int
    reserved_bytes: int
    least_bytes: int
    weights_bytes: int
    activation_bytes: int
    workspace_bytes: int
    graph_bytes: int
    slack_bytes: int
    estimated: str = ""

    @property
    def cached_bytes(self) -> int:
        """What the allocator holds beyond what is allocated; it gives that back before an allocation fails."""
        return self.reserved_bytes - self.allocated_bytes


@dataclass(frozen=True, kw_only=True)
class MemoryPrediction:
    """The predicted peaks of all stages, in the order in which they run.

    Attributes:
        stages: one entry a stage.
        margin: share of the peak to keep free beyond it.
        measured: whether the workspaces were measured on this SM level.
        facts: pipeline, device, size and switches, for the reader.
        allocator: the allocator's settings that it speaks of.
        notes: what is not from a run, or not measured.
        operators: how many operators ran on the meta device.
    """

    stages: tuple[StagePeak, ...]
    margin: float
    measured: bool
    facts: Mapping[str, Any] = field(default_factory=dict)
    allocator: str = SETTINGS
    notes: tuple[str, ...] = ()
    operators: int = 0

    @property
    def peak(self) -> StagePeak:
        """The stage that needs most."""
        return max(self.stages, key=lambda stage: stage.allocated_bytes)

    @property
    def peak_bytes(self) -> int:
        """The predicted peak over all stages, allocated."""
        return self.peak.allocated_bytes

    @property
    def reserved_bytes(self) -> int:
        """The most that the allocator takes from the driver."""
        return max(stage.reserved_bytes for stage in self.stages)

    @property
    def needed_bytes(self) -> int:
        """What must be free: the peak and what the allocator takes at the edge of a cap, each with its margin."""
        return with_margin(self.peak_bytes, self.least_bytes, self.margin)

    @property
    def least_bytes(self) -> int:
        """The most over all stages of what the allocator takes at the edge of a cap."""
        return max(stage.least_bytes for stage in self.stages)

    def stage(self, name: str) -> StagePeak:
        """Return one stage by name."""
        return next(stage for stage in self.stages if stage.stage == name)

    def as_estimate(self) -> MemoryEstimate:
        """Return what plans are made from: its stages are those of the closed form, encoding a picture among them."""
        named: dict[str, StageMemory] = {}
        for stage in self.stages:
            name = "encode" if stage.stage == "vae_encode" else stage.stage
            found = StageMemory(
                stage=name,
                weights_bytes=stage.weights_bytes,
                activation_bytes=stage.activation_bytes + stage.graph_bytes,
                workspace_bytes=stage.workspace_bytes + stage.slack_bytes,
            )
            if name not in named or found.peak_bytes > named[name].peak_bytes:
                named[name] = found
        return MemoryEstimate(stages=tuple(named.values()), margin=self.margin, least_bytes=self.least_bytes)

    def explain(self) -> str:
        """Return the prediction as text."""
        facts = self.facts
        lines = [
            f"Predicted peaks of {facts.get('pipeline', 'a pipeline')} on {facts.get('device', 'a device')}, "
            f"{facts.get('width', '?')}x{facts.get('height', '?')}, batch {facts.get('batch_size', 1)}"
        ]
        if facts.get("options"):
            lines.append(f"  with {', '.join(facts['options'])}")
        for stage in self.stages:
            peak = f"{gib(stage.allocated_bytes)} allocated, {gib(stage.reserved_bytes)} reserved"
            lines.append(f"  {stage.stage}: {peak}{'  ESTIMATED' if stage.estimated else ''}")
            parts = {
                "weights": stage.weights_bytes,
                "activations": stage.activation_bytes,
                "workspaces": stage.workspace_bytes,
                "graphs": stage.graph_bytes,
                "allocator slack": stage.slack_bytes,
            }
            lines.append("    " + ", ".join(f"{name} {gib(size)}" for name, size in parts.items() if size))
        held = f", at least {gib(self.least_bytes)} for gaps between blocks"
        lines.append(f"  with a margin of {self.margin:.0%}{held}: {gib(self.needed_bytes)}")
        lines.append(f"  allocator: {self.allocator}")
        lines.extend(f"  - {note}" for note in self.notes)
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.explain()

    def as_dict(self) -> dict[str, Any]:
        """Return plain dicts, lists, numbers and text."""
        return {"format_version": FORMAT_VERSION, **asdict(self)}

    def to_json(self, *, indent: int | None = 2) -> str:
        """Return `as_dict` as JSON text."""
        return json.dumps(self.as_dict(), indent=indent)
