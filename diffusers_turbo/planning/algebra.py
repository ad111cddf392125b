"""Verdicts on exact algebra: the same numbers with less work."""

from __future__ import annotations

from .options import Options, PointwiseMatmul, PromptProjections, SharedGuidance, TimeProjections
from .request import Situation, Verdict, leave

_GAINS: dict[type[Options], str] = {
    PromptProjections: "It spares two products a cross-attention layer at every step",
    TimeProjections: "It spares a UNet's time embedding and a product a resnet at every step",
    SharedGuidance: "It halves the first resnet and the first self-attention of a UNet without added embeddings",
    PointwiseMatmul: "It runs 1x1 convolutions by the library of matrix products",
}


def judge_algebra(situation: Situation) -> list[Verdict]:
    """Decide on what reaches the same numbers with less work: what was not measured is left to the user."""
    facts, device = situation.pipeline, situation.device
    verdicts = []
    for kind, gain in _GAINS.items():
        if facts.shape.kind == "transformer":
            verdicts.append(leave(kind(), "It was made for UNets."))
        elif facts.refusals:
            verdicts.append(leave(kind(), f"{'; '.join(facts.refusals)}, so its layers are left as they are."))
        else:
            # a plan throws only what was run and measured on such a device
            verdicts.append(leave(kind(), f"{gain}; how much that gains on {device.name} was not measured yet."))
    return verdicts
