"""A bias and a residual in one pass, against plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffusers_turbo.kernels.bias_residual import BiasResidualLaunch, bias_residual
from tests.kernels.checking import DTYPES, check, image, randn


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 12, 5, 7), (1, 320, 4, 4), (3, 5), (2, 6, 9), (1, 4, 2, 3, 5)], ids=str)
def test_agrees(shape, dtype, device):
    x, residual = (image(*shape, dtype=dtype, device=device, seed=seed) for seed in (0, 1))
    output = check("bias_residual", x, residual, randn(shape[1], dtype=dtype, device=device) * 3)
    assert output.stride() == x.stride()


@settings(max_examples=12, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 70),
    side=st.integers(1, 6),
    launch=st.builds(
        BiasResidualLaunch, rows=st.sampled_from([1, 4, 16]), columns=st.sampled_from([16, 64]), warps=st.just(1)
    ),
)
def test_any_shape_and_cut(batch, channels, side, launch, device):
    x, residual = (image(batch, channels, side, side, device=device, seed=seed) for seed in (0, 1))
    check("bias_residual", x, residual, randn(channels, device=device), launch=launch, compare=False)


def test_a_bias_of_another_dtype(device):
    x, residual = (image(2, 12, 3, 3, dtype=torch.float16, device=device, seed=seed) for seed in (0, 1))
    bias = randn(12, device=device)
    expected = (x.double() + bias.double()[:, None, None] + residual.double()).half()
    torch.testing.assert_close(bias_residual(x, residual, bias), expected, atol=2e-3, rtol=1e-3)


def test_of_nothing(device):
    x = torch.empty(0, 4, 2, 2, device=device)
    assert bias_residual(x, x, torch.ones(4, device=device)).shape == x.shape
