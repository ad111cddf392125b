"""How far two sets of results are apart, pooled over pictures, and whether that still counts as exact.

Numbers in, verdict out: nothing here runs a pipeline. Distances are taken to the naive fp32 result from the same
latents and embeddings. The definition of exact is in docs/decisions/exactness.md: in fp32 at least `EXACT_FP32_DB`;
in half precision at most `EXACT_RATIO` times as far as stock diffusers is in the same dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

EXACT_FP32_DB = 90.0
"""Lowest pooled PSNR that rounding alone explains in fp32 (24 mantissa bits)."""

EXACT_RATIO = 1.25
"""Largest pooled distance, relative to stock in the same dtype, that reordering of roundings explains."""


@dataclass(frozen=True, kw_only=True)
class Distance:
    """A pooled distance from a reference.

    Attributes:
        pictures: how many were pooled.
        rmse: root mean square error of the decoded pictures, whose values lie in [0, 1].
        psnr_db: the same as peak signal-to-noise ratio; infinite when equal to the bit.
        worst_psnr_db: of the single worst picture.
        latents: |a - b| / |b| over all final latents; None when no latents were given.
        broken: pictures with a NaN or infinity in them.
    """

    pictures: int
    rmse: float
    psnr_db: float
    worst_psnr_db: float
    latents: float | None
    broken: int


def decibels(rmse: float) -> float:
    """Return the PSNR of a root mean square error of values in [0, 1].

    >>> decibels(0.001)
    60.0
    """
    return math.inf if rmse == 0 else round(-20 * math.log10(rmse), 9)


def distance(
    pictures: Tensor, reference: Tensor, latents: Tensor | None = None, reference_latents: Tensor | None = None
) -> Distance:
    """Pool the distance of `pictures` `[B, 3, H, W]` (and `latents` `[B, C, h, w]`) from their references.

    Raises:
        ValueError: shapes differ.
    """
    if pictures.shape != reference.shape:
        raise ValueError(f"pictures {list(pictures.shape)} cannot be compared with {list(reference.shape)}")
    errors = (pictures.double().cpu() - reference.double().cpu()).flatten(1).square().mean(dim=1)
    broken = int((~torch.isfinite(pictures.double().cpu().flatten(1)).all(dim=1)).sum())
    relative = None
    if latents is not None and reference_latents is not None:
        ours, theirs = latents.double().cpu(), reference_latents.double().cpu()
        relative = float((ours - theirs).norm() / theirs.norm())
    rmse = float(errors.mean().sqrt())
    return Distance(
        pictures=len(errors),
        rmse=rmse,
        psnr_db=decibels(rmse),
        worst_psnr_db=decibels(float(errors.max().sqrt())),
        latents=relative,
        broken=broken,
    )


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether a result is exact, and the reasons if it is not."""

    exact: bool
    reasons: tuple[str, ...]


def judge(ours: Distance, stock: Distance | None, *, half: bool) -> Verdict:
    """Judge a distance by the definition of exact.

    Args:
        ours: distance of the result from the naive fp32 one.
        stock: distance of stock diffusers in the same dtype; needed when `half`.
        half: the result was made in half precision.

    Raises:
        ValueError: `half` without `stock`.
    """
    reasons = []
    if ours.broken:
        reasons.append(f"{ours.broken} of {ours.pictures} pictures hold NaN or infinity")
    if not half:
        if not ours.psnr_db >= EXACT_FP32_DB:
            reasons.append(f"{ours.psnr_db:.1f} dB from the reference, below {EXACT_FP32_DB:.0f} dB")
    elif stock is None:
        raise ValueError("in half precision a verdict needs stock's own distance")
    else:
        for name, mine, theirs in (("pictures", ours.rmse, stock.rmse), ("latents", ours.latents, stock.latents)):
            if mine is not None and theirs is not None and not mine <= EXACT_RATIO * theirs:
                reasons.append(f"{name} {mine / theirs:.2f} times as far as stock, above {EXACT_RATIO}")
    return Verdict(exact=not reasons, reasons=tuple(reasons))
