"""Recordings through the allocator: when each stage needs most, and what makes that up."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil

from .allocator import DEFAULT_POOL, Allocator, Block
from .recording import Convolved, Entered, Gone, Left, Made, Multiplied, Recording
from .residency import Residency
from .workspaces import Workspaces

CAPTURE_STREAM = -2
"""Key of the stream on which CUDA graphs are captured."""

CATEGORIES = ("weights", "activations", "workspace", "graphs")


@dataclass(frozen=True, kw_only=True)
class Peak:
    """The moment at which most was allocated, in bytes, by what it was for; `reserved` is the most in the stage."""

    allocated: int = 0
    reserved: int = 0
    weights: int = 0
    activations: int = 0
    workspace: int = 0
    graphs: int = 0

    def higher(self, other: Peak) -> Peak:
        """The higher of two peaks, with what was reserved at most."""
        top = self if self.allocated >= other.allocated else other
        parts = {name: getattr(top, name) for name in CATEGORIES}
        return Peak(allocated=top.allocated, reserved=max(self.reserved, other.reserved), **parts)


@dataclass
class Replay:
    """Runs recordings one after the other on one allocator, with workspaces and with weights that come and go."""

    allocator: Allocator
    workspaces: Workspaces
    residency: Residency
    peak: Peak = field(default_factory=Peak)
    held: list[Block] = field(default_factory=list)
    _blas: set[int] = field(default_factory=set)
    _pools: int = 0

    def begin_stage(self) -> None:
        """Count peaks anew from here."""
        self.peak = Peak()
        self._look()

    def run(self, recording: Recording, pool: int = DEFAULT_POOL, stream: int = DEFAULT_POOL) -> list[Block]:
        """Replay a recording; return the blocks that it leaves behind."""
        category = "activations" if pool == DEFAULT_POOL else "graphs"
        blocks: dict[int, Block] = {}
        self.residency.prepare(recording.events)
        for event in recording.events:
            match event:
                case Made(key=key, size=size):
                    blocks[key] = self.allocator.allocate(size, category, pool)
                case Gone(key=key):
                    self.allocator.free(blocks.pop(key))
                    continue
                case Convolved():
                    self._convolve(event, pool)
                    continue
                case Multiplied():
                    self._multiply(pool, stream)
                case Entered(path=path):
                    self.residency.enter(path)
                case Left(path=path):
                    self.residency.leave(path)
                    continue
            self._look()
        return [blocks[key] for key in recording.kept if key in blocks]

    def capture(self, recording: Recording, *, required: bool = False, share: float = 1.0) -> list[Block]:
        """Record a stage's networks as CUDA graphs, as `enable_cuda_graphs()` does; return what stays of it.

        Inputs and outputs, which are the graph's own; while they are held the graph's pool is nobody else's. Where
        there is no room to record, networks run without a graph, unless it is `required`. Of its inputs it is given a
        `share` at a time.
        """
        self.allocator.empty_cache(DEFAULT_POOL)  # torch.cuda.graph does so before it records
        inputs = [self.hold(ceil(size * share), "graphs") for given in recording.inputs for size in given]
        self._pools += 1
        self.allocator.recording = required
        outputs = self.run(recording, self._pools, CAPTURE_STREAM)
        self.allocator.recording = False
        self._look()
        return inputs + outputs

    def drop(self, graphs: list[Block]) -> None:
        """Give back what stays of captures, and what is cached."""
        self.release(graphs)
        self.allocator.empty_cache()

    def hold(self, size: int, category: str) -> Block:
        """Allocate, until it is released."""
        block = self.allocator.allocate(size, category)
        self._look()
        return block

    def release(self, blocks: list[Block]) -> None:
        """Give blocks back."""
        for block in blocks:
            self.allocator.free(block)

    def _convolve(self, event: Convolved, pool: int) -> None:
        if size := self.workspaces.convolution_bytes(event):
            block = self.allocator.allocate(size, "workspace", pool)
            self._look()
            self.allocator.free(block)

    def _multiply(self, pool: int, stream: int) -> None:
        if stream not in self._blas:
            self._blas.add(stream)
            self.allocator.allocate(self.workspaces.cublas_bytes, "workspace", pool)
            if stream == DEFAULT_POOL and self.workspaces.other_bytes:
                self.allocator.allocate(self.workspaces.other_bytes, "workspace", pool)

    def _look(self) -> None:
        memory = self.allocator
        if memory.allocated <= self.peak.allocated and memory.reserved <= self.peak.reserved:
            return
        now = Peak(
            allocated=memory.allocated,
            reserved=memory.reserved,
            **{name: memory.requested[name] for name in CATEGORIES},
        )
        self.peak = self.peak.higher(now) if self.peak.allocated else now
