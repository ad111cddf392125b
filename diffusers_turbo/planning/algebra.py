"""Verdicts on exact algebra: the same numbers with less work."""

from __future__ import annotations

from .options import Options, PointwiseMatmul, PromptProjections, SharedGuidance, TimeProjections, VAEUpcastCopy
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
    return [*verdicts, _judge_upcast_copy(situation)]


def _judge_upcast_copy(situation: Situation) -> Verdict:
    facts, option = situation.pipeline, VAEUpcastCopy()
    if facts.vae is None or not facts.vae.force_upcast:
        return leave(option, f"{facts.class_name} decodes in the dtype its VAE has.")
    return leave(option, "It spares two casts of the VAE a picture; what that gains was not measured on a GPU yet.")
