"""One call of a pipeline through a replay: its stages in turn, casts of the VAE between them, and CUDA graphs."""

from __future__ import annotations

from dataclasses import dataclass

from .allocator import Block
from .recording import Recording
from .replay import Peak, Replay


@dataclass
class PipelineCall:
    """One call of the pipeline through a replay, or two where graphs are captured at the second.

    Attributes:
        widens_vae, keeps_wide: whether the VAE is cast to float32 to decode, beside its weights of before.
        offloaded: whether weights come and go; then of the networks only the denoiser is captured.
        graphs, leaves: whether calls are captured, and leave with a denoiser that does so between calls.
        share_of_batch: how much of the batch the denoiser sees in a call.
        projected_bytes: what is computed of the prompt ahead.
    """

    replay: Replay
    recordings: dict[str, Recording]
    widens_vae: bool
    keeps_wide: bool
    offloaded: bool
    graphs: bool
    leaves: bool
    share_of_batch: float
    projected_bytes: int
    _copied: bool = False

    def peaks(self) -> dict[str, Peak]:
        """Return the peak of each stage."""
        self.replay.residency.begin()
        found: dict[str, Peak] = {}
        # a denoiser is captured at its second step, everything else at the second picture
        for call in range(2 if self.graphs else 1):
            held: list[Block] = []
            if self.projected_bytes and call == 0:
                self.replay.hold(self.projected_bytes, "activations")
            for stage, recording in self.recordings.items():
                self.replay.begin_stage()
                self._stage(stage, recording, call, held)
                found[stage] = found[stage].higher(self.replay.peak) if stage in found else self.replay.peak
            self.replay.release(held)
        return found

    def _stage(self, stage: str, recording: Recording, call: int, held: list[Block]) -> None:
        of_vae = stage in ("vae_encode", "decode")
        cast = of_vae and self.widens_vae and not self.offloaded and not self._copied
        if cast:
            self._copied = self.keeps_wide  # the copy of the first cast serves all others
            self.replay.residency.widen("vae", keep=self.keeps_wide)
        if self.graphs and stage == "denoise":
            self._denoise(recording, call, held)
        elif self.graphs and call == 1 and stage != "vae_encode" and not self.offloaded:
            self.replay.capture(recording)
        else:
            held += self.replay.run(recording)
        if cast and not self.keeps_wide:
            self.replay.residency.narrow("vae")

    def _denoise(self, recording: Recording, call: int, held: list[Block]) -> None:
        if call == 0:
            held += self.replay.run(recording)
        if call == 0 or self.leaves:
            # what was projected is an input, of which a graph has its own copy
            own = int(self.projected_bytes * self.share_of_batch)
            graphs = [self.replay.hold(own, "graphs")] if own else []
            graphs += self.replay.capture(recording, required=True, share=self.share_of_batch)
            if self.leaves:
                self.replay.drop(graphs)
        elif self.projected_bytes:
            self.replay.hold(2 * self.projected_bytes, "graphs")  # their own graph: each layer's part, and all
