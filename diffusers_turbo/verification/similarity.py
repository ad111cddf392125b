"""Metrics of perception beside the root mean square: SSIM and FLIP, where their packages are installed."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor


def ssim(pictures: Tensor, reference: Tensor) -> float | None:
    """Return the mean structural similarity of `[P, 3, H, W]` in [0, 1]; None without torchmetrics.

    Wang et al. 2004, https://doi.org/10.1109/TIP.2003.819861
    """
    if find_spec("torchmetrics") is None:
        return None
    from torchmetrics.functional.image import structural_similarity_index_measure

    found = structural_similarity_index_measure(_sound(pictures), _sound(reference), data_range=1.0)
    assert isinstance(found, Tensor)
    return float(found)


def flip(pictures: Tensor, reference: Tensor) -> float | None:
    """Return the mean FLIP error of `[P, 3, H, W]` in [0, 1], 0 when alike; None without flip-evaluator.

    Andersson et al. 2020, https://doi.org/10.1145/3406183
    """
    if find_spec("flip_evaluator") is None:
        return None
    import flip_evaluator

    pairs = zip(_sound(pictures).permute(0, 2, 3, 1), _sound(reference).permute(0, 2, 3, 1), strict=True)
    errors = [
        flip_evaluator.evaluate(theirs.contiguous().numpy(), ours.contiguous().numpy(), "LDR", applyMagma=False)[1]
        for ours, theirs in pairs
    ]
    return float(sum(errors) / len(errors))


def _sound(pictures: Tensor) -> Tensor:
    """Values in [0, 1], NaN as black, as a screen would show them."""
    return torch.nan_to_num(pictures.float(), nan=0.0).clamp(0, 1)
