"""Upsampling folded into the convolution after it, against plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffusers_turbo.actions.tf32 import fp32_precision
from diffusers_turbo.kernels.upsample_conv import UpsampleConvLaunch, upsample_conv, upsample_conv_plain
from tests.kernels.checking import DTYPES, check, cuts_off, image, largest_error, randn, rms_error

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

THREE_ROUNDINGS = 1.3
"""Folded weights, the convolution's result and the output are rounded, where PyTorch on a GPU rounds two of these, each
with an error of its own and of one size: sqrt(3 / 2) = 1.22 times as far from the truth."""


@pytest.fixture(autouse=True)
def _float32():
    with fp32_precision("ieee"):  # cuDNN convolves in TF32 otherwise
        yield


def kernel(outputs: int, inputs: int, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    """Weights `[O, I, 3, 3]` as a layer has them, channels innermost."""
    weight = randn(outputs, 3, 3, inputs, seed=7) * (9 * inputs) ** -0.5
    return weight.to(device=device, dtype=dtype).movedim(-1, 1)


@every_dtype
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "shape", [(2, 16, 24, 5, 7), (1, 64, 80, 4, 16), (1, 3, 5, 1, 1), (1, 1, 1, 3, 2), (2, 7, 33, 1, 9)], ids=str
)
def test_agrees(shape, bias, dtype, device):
    batch, inputs, outputs, *sides = shape
    like = {"dtype": dtype, "device": device}
    x = image(batch, inputs, *sides, **like)
    vectors = [randn(outputs, seed=3, **like)] if bias else []
    output = check("upsample_conv", x, kernel(outputs, inputs, **like), *vectors, compare=dtype == torch.float32)
    assert output.movedim(1, -1).is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_three_roundings_and_not_two(dtype, device):
    like = {"dtype": dtype, "device": device}
    if cuts_off(dtype):
        pytest.skip("here bfloat16 is cut off and not rounded")
    x, weight, bias = image(2, 64, 16, 16, **like), kernel(64, 64, **like), randn(64, seed=3, **like) * 0.1
    wide = (x.double(), weight.double())
    truth = upsample_conv_plain(*wide, bias.double())
    twice = upsample_conv_plain(*wide).to(dtype) + bias[:, None, None]
    assert rms_error(upsample_conv(x, weight, bias), truth) <= THREE_ROUNDINGS * rms_error(twice, truth)


def test_every_output_sees_its_own_pixels(device):
    """Whole numbers, which no order of sums rounds: any wrong tap, pixel or border would show."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randint(-9, 10, shape, generator=generator).float().to(device)
        for shape in ((2, 5, 6, 3), (4, 3, 3, 3), (4,))
    )
    x, weight = x.movedim(-1, 1), weight.movedim(-1, 1)
    assert torch.equal(upsample_conv(x, weight, bias), upsample_conv_plain(x, weight, bias))


def test_a_picture_is_the_same_beside_others(device):
    x, weight, bias = image(3, 16, 6, 5, device=device), kernel(8, 16, device=device), randn(8, device=device)
    together = upsample_conv(x, weight, bias)
    torch.testing.assert_close(together[1:2], upsample_conv(x[1:2], weight, bias), atol=1e-6, rtol=1e-6)


def test_weights_changed_in_place_count(device):
    x, weight = image(1, 4, 3, 3, device=device), kernel(6, 4, device=device)
    upsample_conv(x, weight)
    weight.mul_(-2)
    check("upsample_conv", x, weight)


def test_agrees_with_the_layer_of_diffusers(device):
    upsampling = pytest.importorskip("diffusers.models.upsampling")
    layer = upsampling.Upsample2D(12, use_conv=True, out_channels=20).to(device, memory_format=torch.channels_last)
    x = image(2, 12, 5, 4, device=device)
    with torch.no_grad():
        ours = upsample_conv(x, layer.conv.weight, layer.conv.bias)
        torch.testing.assert_close(ours, layer(x), atol=1e-5, rtol=1e-5)


@settings(max_examples=12, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 3),
    inputs=st.integers(1, 40),
    outputs=st.integers(1, 40),
    sides=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    launch=st.builds(
        UpsampleConvLaunch, rows=st.sampled_from([1, 4, 16]), columns=st.sampled_from([16, 64]), warps=st.just(1)
    ),
)
def test_any_shape_and_cut(batch, inputs, outputs, sides, launch, device):
    x, bias = image(batch, inputs, *sides, device=device), randn(outputs, device=device)
    check("upsample_conv", x, kernel(outputs, inputs, device=device), bias, launch=launch, compare=False)


def test_a_bias_of_another_dtype(device):
    like = {"dtype": torch.float16, "device": device}
    x, weight, bias = image(1, 12, 3, 3, **like), kernel(8, 12, **like), randn(8, device=device)
    truth = upsample_conv_plain(x.double(), weight.double(), bias.double())
    assert largest_error(upsample_conv(x, weight, bias), truth) < 3 * 5.2e-4


def test_of_nothing(device):
    x = torch.empty(0, 4, 2, 3, device=device).to(memory_format=torch.channels_last)
    assert upsample_conv(x, kernel(6, 4, device=device)).shape == (0, 6, 4, 6)
