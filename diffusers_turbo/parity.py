"""How far two sets of results are apart, pooled over pictures, and whether that still counts as exact.

Numbers in, verdict out: nothing here runs a pipeline. Distances are taken to the naive fp32 result from the same
latents and embeddings. The definition of exact is in docs/decisions/exactness.md: in fp32 at least `EXACT_FP32_DB`;
in half precision at most `EXACT_RATIO` times as far as stock diffusers is in the same dtype. What is not exact is
close from `CLOSE_DB` on, and different below.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

EXACT_FP32_DB = 90.0
"""Lowest pooled PSNR that rounding alone explains in fp32 (24 mantissa bits)."""

EXACT_RATIO = 1.25
"""Largest pooled distance, relative to stock in the same dtype, that reordering of roundings explains."""

CLOSE_DB = 25.0
"""Lowest pooled PSNR of a lossy result that still shows the same picture. It lies between what lossy levers give on the
emoji model (bf16 44 dB, VAE tiles of half the picture's side 36) and what faults give (one layer fed another prompt 21,
mid block skipped 11): docs/benchmarks/lossy-distances.json. A fault can be smaller than that, so a plan of exact steps
is held to *exact*."""

BLACK = 1 / 255
"""A picture with no value above this is black."""


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
        black: pictures that are black where the reference is not.
    """

    pictures: int
    rmse: float
    psnr_db: float
    worst_psnr_db: float
    latents: float | None
    broken: int
    black: int = 0


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
    flat, wanted = pictures.double().cpu().flatten(1), reference.double().cpu().flatten(1)
    errors = (flat - wanted).square().mean(dim=1)
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
        broken=int((~torch.isfinite(flat).all(dim=1)).sum()),
        black=int(((flat.amax(dim=1) <= BLACK) & (wanted.amax(dim=1) > BLACK)).sum()),
    )


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How a result is judged, and the reasons why it is no better."""

    level: Literal["exact", "close", "different"]
    reasons: tuple[str, ...]

    @property
    def exact(self) -> bool:
        """Whether the result is exact."""
        return self.level == "exact"


def judge(ours: Distance, stock: Distance | None, *, half: bool) -> Verdict:
    """Judge a distance: exact by its definition, else close or different by `CLOSE_DB`.

    Args:
        ours: distance of the result from the naive fp32 one.
        stock: distance of stock diffusers in the same dtype; needed when `half`. Given in fp32, a result no farther
            from the reference than stock is exact as well: on a GPU torch convolves fp32 in TF32 unless told not to,
            and then stock itself stays far below `EXACT_FP32_DB`.
        half: the result was made in half precision.

    Raises:
        ValueError: `half` without `stock`.
    """
    if half and stock is None:
        raise ValueError("in half precision a verdict needs stock's own distance")
    unusable = _unusable(ours)
    too_far = () if not half and ours.psnr_db >= EXACT_FP32_DB else _too_far(ours, stock)
    if not unusable and not too_far:
        return Verdict(level="exact", reasons=())
    if unusable or not ours.psnr_db >= CLOSE_DB:
        return Verdict(level="different", reasons=(*unusable, *too_far, *_below(ours, CLOSE_DB)))
    return Verdict(level="close", reasons=too_far)


def _unusable(ours: Distance) -> tuple[str, ...]:
    """Why the pictures are no pictures at all."""
    found = []
    if ours.broken:
        found.append(f"{ours.broken} of {ours.pictures} pictures hold NaN or infinity")
    if ours.black:
        found.append(f"{ours.black} of {ours.pictures} pictures are black")
    return tuple(found)


def _too_far(ours: Distance, stock: Distance | None) -> tuple[str, ...]:
    """Why a result is farther from the reference than rounding explains."""
    if stock is None:
        return _below(ours, EXACT_FP32_DB)
    pairs = (("pictures", ours.rmse, stock.rmse), ("latents", ours.latents, stock.latents))
    return tuple(
        f"{name} {mine / theirs if theirs else math.inf:.2f} times as far as stock, above {EXACT_RATIO}"
        for name, mine, theirs in pairs
        if mine is not None and theirs is not None and not mine <= EXACT_RATIO * theirs
    )


def _below(ours: Distance, wanted_db: float) -> tuple[str, ...]:
    """Say that a result lies below a threshold, if it does; one with NaN lies nowhere."""
    if ours.psnr_db >= wanted_db or math.isnan(ours.psnr_db):
        return ()
    return (f"{ours.psnr_db:.1f} dB from the reference, below {wanted_db:.0f} dB",)
