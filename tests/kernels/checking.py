"""How a kernel's result is judged: against plain PyTorch in fp64, and beside plain PyTorch in the same dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffusers_turbo.kernels import KERNELS
from diffusers_turbo.kernels.base import interpreting

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

NO_WORSE = 1.25
"""A kernel's root mean square error may be this many times that of plain PyTorch in the same dtype."""


def check(name: str, *args: Any, strain: float = 0.0, compare: bool = True, launch: Any = None, **options: Any) -> Any:
    """Run a kernel and assert that it is near the truth and no further from it than PyTorch.

    Args:
        name: of the kernel in `KERNELS`.
        strain: the mean over the deviation, where it is large: fp32 statistics lose that factor.
        compare: also with PyTorch's error; of a few values, either may happen to be exact.
    """
    kernel = KERNELS[name]
    dtype = args[0].dtype
    results = tuple_of(kernel.run(*args, launch=launch, **options))
    truths = tuple_of(kernel.plain(*map(widened, args), **{key: widened(value) for key, value in options.items()}))
    plains = tuple_of(kernel.plain(*args, **options))
    cut_off = cuts_off(dtype)
    tolerance = kernel.tolerance[dtype] * (2 if cut_off else 1)
    if strain:
        tolerance += kernel.tolerance[torch.float32] * strain
    for result, truth, plain in zip(results, truths, plains, strict=True):
        assert result.dtype == dtype
        assert result.shape == plain.shape
        assert largest_error(result, truth) < tolerance
        if compare and not cut_off:
            floor = 2 * torch.finfo(torch.float32).eps  # below it, both are as good as exact
            assert rms_error(result, truth) <= max(NO_WORSE * rms_error(plain, truth), floor)
    return results[0] if len(results) == 1 else results


def cuts_off(dtype: torch.dtype) -> bool:
    """Whether a dtype is cut off where every GPU rounds it, as Triton's interpreter does: twice the error."""
    return interpreting() and dtype == torch.bfloat16


def tuple_of(results: Any) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def widened(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) else value


def largest_error(result: Tensor, truth: Tensor) -> float:
    """Largest difference over the largest magnitude of the truth."""
    return float((result.double() - truth).abs().max() / truth.abs().max())


def rms_error(result: Tensor, truth: Tensor) -> float:
    """Root mean square of the difference over that of the truth."""
    return float((result.double() - truth).square().mean().sqrt() / truth.square().mean().sqrt())


def randn(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Tensor:
    """Normal numbers, the same on every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device=device, dtype=dtype)


def image(
    batch: int, channels: int, *sides: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> Tensor:
    """Normal numbers `[B, C, ..]` with channels innermost, each channel with a mean and a deviation of its own."""
    x = randn(batch, *sides, channels, seed=seed)
    x = x * randn(channels, seed=seed + 1).exp() + randn(channels, seed=seed + 2)
    return x.to(device=device, dtype=dtype).movedim(-1, 1)
