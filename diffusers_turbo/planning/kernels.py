"""Verdict on fused kernels: for UNets on NVIDIA GPUs with Triton, and beside a compiler not needed."""

from __future__ import annotations

from .options import FusedKernels
from .request import Situation, Verdict, leave
from .speed import sm_text

LOWEST_SM = (7, 0)
"""Where Triton starts (https://triton-lang.org/main/getting-started/installation.html)."""


def judge_kernels(situation: Situation, *, compiled: bool) -> Verdict:
    """Decide on fused kernels: what was not measured is left to the user. `compiled` says if the plan compiles."""
    option, device, facts = FusedKernels(), situation.device, situation.pipeline
    if device.device_type != "cuda":
        return leave(option, f"They run on NVIDIA GPUs only; this is {device.name}.")
    if device.sm is None:
        return leave(option, f"They were written for NVIDIA GPUs; this is {device.name}.")
    if device.sm < LOWEST_SM:
        return leave(option, f"Triton needs SM {LOWEST_SM[0]}.{LOWEST_SM[1]}, this is {sm_text(device)}.")
    if not device.triton:
        return leave(option, "Triton is missing, which they are written in.")
    if facts.refusals:
        return leave(option, f"{'; '.join(facts.refusals)}, which was not tried with them.")
    if facts.shape.kind == "transformer":
        return leave(option, "A transformer has few of the layers they fit, most of them in its VAE; not measured.")
    if compiled:
        return leave(option, "The compiler fuses the same passes itself.")
    return leave(
        option,
        "They spare passes over memory in norms and feed-forwards of a channels-last UNet, but this package has not "
        "measured them in one on a GPU yet; throw it yourself.",
    )
