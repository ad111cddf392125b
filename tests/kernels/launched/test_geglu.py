"""GEGLU's second half against plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffusers_turbo.kernels.geglu import GegluLaunch, geglu
from tests.kernels.checking import DTYPES, check, randn


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 64), (1, 9, 2 * 77), (5, 2 * 320), (2 * 257,), (2, 2, 3, 2)], ids=str)
def test_agrees(shape, dtype, device):
    check("geglu", randn(*shape, dtype=dtype, device=device) * 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gates_from_far_below_zero_to_far_above(dtype, device):
    gate = torch.linspace(-12, 12, 500, device=device).to(dtype)
    check("geglu", torch.cat([torch.ones_like(gate), gate])[None])


def test_agrees_with_the_layer_of_diffusers(device):
    activations = pytest.importorskip("diffusers.models.activations")
    layer = activations.GEGLU(16, 24).to(device)
    x = randn(2, 5, 16, device=device)
    with torch.no_grad():
        assert torch.allclose(geglu(layer.proj(x)), layer(x), rtol=1e-5, atol=1e-6)


@settings(max_examples=12, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 20),
    width=st.integers(1, 90),
    launch=st.builds(
        GegluLaunch, rows=st.sampled_from([1, 4, 16]), columns=st.sampled_from([16, 64]), warps=st.just(1)
    ),
)
def test_any_shape_and_cut(rows, width, launch, device):
    check("geglu", randn(rows, 2 * width, device=device), launch=launch, compare=False)


def test_of_nothing(device):
    assert geglu(torch.empty(2, 0, 8, device=device)).shape == (2, 0, 4)
