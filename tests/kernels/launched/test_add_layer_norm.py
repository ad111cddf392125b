"""Residual add and LayerNorm against plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from diffusers_turbo.kernels import KERNELS
from diffusers_turbo.kernels.add_layer_norm import AddLayerNormLaunch, add_layer_norm
from tests.kernels.checking import DTYPES, check, cuts_off, largest_error, randn

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@every_dtype
@pytest.mark.parametrize("width", [2, 33, 320, 640, 1280, 3000])
def test_agrees(width, dtype, device):
    x, residual = randn(2, 2, 5, width, dtype=dtype, device=device)
    weight, bias = randn(2, width, dtype=dtype, device=device, seed=1)
    added, _ = check("add_layer_norm", x, residual, weight, bias)
    if not cuts_off(dtype):
        assert torch.equal(added, x + residual)


@every_dtype
def test_without_weights_and_with_one(dtype, device):
    x, residual = randn(2, 7, 40, dtype=dtype, device=device)
    check("add_layer_norm", x, residual, eps=1e-6)
    check("add_layer_norm", x, residual, randn(40, dtype=dtype, device=device))
    check("add_layer_norm", x, residual, None, randn(40, dtype=dtype, device=device))


@every_dtype
@pytest.mark.parametrize("width", [33, 320])
def test_nothing_to_add(width, dtype, device):
    x, weight, bias = randn(3, 9, width, dtype=dtype, device=device)
    before = x.clone()
    added, normed = add_layer_norm(x, None, weight[0], bias[0])
    assert added is x
    assert torch.equal(x, before)
    truth = F.layer_norm(x.double(), (width,), weight[0].double(), bias[0].double())
    assert largest_error(normed, truth) < KERNELS["add_layer_norm"].tolerance[dtype] * (2 if cuts_off(dtype) else 1)
    promised = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.diffusers_turbo.layer_norm.default, (x, None, None, 1e-5, []), test_utils=promised)


@every_dtype
def test_a_mean_far_larger_than_the_deviation(dtype, device):
    ratio = {torch.float32: 1e4, torch.float16: 250, torch.bfloat16: 33}[dtype]
    x, residual = ((randn(2, 6, 320) / ratio + 1) * 5000).to(device=device, dtype=dtype)
    check("add_layer_norm", x, residual, strain=1.5 * ratio)


@settings(max_examples=12, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 20),
    width=st.integers(2, 600),
    launch=st.builds(AddLayerNormLaunch, rows=st.sampled_from([1, 2, 8]), warps=st.just(1)),
)
def test_any_shape_and_cut(rows, width, launch, device):
    x, residual = randn(2, rows, width, device=device)
    # Of two values the norm is a sign, divided by next to nothing.
    check("add_layer_norm", x, residual, launch=launch, strain=4, compare=False)


def test_of_nothing(device):
    x = torch.empty(2, 0, 8, device=device)
    assert [y.shape for y in add_layer_norm(x, x)] == [(2, 0, 8)] * 2
