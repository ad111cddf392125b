"""Tensors as fused attention kernels load them: whole vectors of 16 bytes, from addresses that divide by 16."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def whole_vectors(*states: Tensor) -> list[Tensor]:
    """`[B, H, N, D]` tensors with D contiguous and padded by zeros to a multiple of 8.

    Zeros change neither the scores nor the first D columns of the output; the scale must stay that of the true D.
    https://github.com/pytorch/pytorch/blob/main/aten/src/ATen/native/transformers/attention.cpp (pad_last_dim)
    """
    padding = -states[0].shape[-1] % 8
    if padding:
        return [F.pad(x, (0, padding)) for x in states]
    return [x if x.stride(-1) == 1 else x.contiguous() for x in states]


def align_bias(bias: Tensor, batch: int, heads: int, n_query: int) -> Tensor:
    """A `[B or 1, H or 1, N or 1, M]` bias expanded to `[B, H, N, M]`, each row starting at a multiple of 16 elements.

    Every stride but the last has to divide by a vector's length, 4 elements in fp32 and 8 in 16 bits; PyTorch itself
    pads to 16. The padding lies outside the returned view.
    https://github.com/pytorch/pytorch/blob/main/aten/src/ATen/native/transformers/attention.cpp (preprocess_mask)
    """
    n_key = bias.shape[-1]
    padding = -n_key % 16
    bias = F.pad(bias, (0, padding))[..., :n_key] if padding else bias.contiguous()
    return bias.expand(batch, heads, n_query, n_key)
