"""Real kernels in a real UNet: one step beside stock, eager and through a compiler's graph."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from diffusers_turbo.actions.fused_kernels import apply
from diffusers_turbo.actions.tf32 import fp32_precision
from diffusers_turbo.planning.options import FusedKernels
from tests import tiny
from tests.kernels.checking import NO_WORSE, randn


def fused(model: Any) -> tuple[Any, Callable[[], list[str]]]:
    """Throw the switch on a channels-last copy of a model; return it with a function that says how its layers fared."""
    ours = copy.deepcopy(model).to(memory_format=torch.channels_last)
    journal = apply(SimpleNamespace(components={"unet": ours}), FusedKernels())
    return ours, journal.told


def small_unet() -> Any:
    """One level with self- and cross-attention, and few groups: each is a program that the interpreter has to run."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("UpBlock2D",)}
    return tiny.unet(block_out_channels=(32,), norm_num_groups=2, **blocks)


def step(unet: Any, dtype: torch.dtype, device: str) -> Tensor:
    latents = randn(1, 4, 4, 4, dtype=dtype, device=device)
    context = randn(1, tiny.TOKENS, tiny.CONTEXT, dtype=dtype, device=device)
    with fp32_precision("ieee"):  # cuDNN convolves in TF32 otherwise
        return unet(latents, 500, context).sample


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@torch.no_grad()
def test_one_step(dtype, device):
    truth = small_unet().double()
    stock = copy.deepcopy(truth).to(device, dtype)
    ours, told = fused(stock)
    expected = step(truth, torch.float64, "cpu")
    error, stock_error = (
        (step(model, dtype, device).double().cpu() - expected).square().mean().sqrt() for model in (ours, stock)
    )
    report = " ".join(told())
    assert "plain PyTorch" not in report, report
    assert "not called" not in report
    assert error <= max(NO_WORSE * stock_error, 1e-6 * expected.abs().max())


@torch.no_grad()
def test_in_one_graph_of_a_compiler(device):
    stock = small_unet().to(device)
    ours, told = fused(stock)
    ours.compile(backend="aot_eager", fullgraph=True)
    expected = step(stock, torch.float32, device)
    torch.testing.assert_close(step(ours, torch.float32, device), expected, atol=1e-5, rtol=1e-4)
    assert "plain PyTorch" not in " ".join(told())


@torch.no_grad()
def test_an_upsampling_alone_and_in_one_graph_of_a_compiler(device):
    """The small UNet has none, and one large enough takes the interpreter long."""
    torch.manual_seed(0)
    stock = nn.Sequential(Upsample2D(8, use_conv=True, out_channels=12)).to(device)
    ours, told = fused(stock)
    x = randn(1, 8, 32, 33, device=device).to(memory_format=torch.channels_last)
    with fp32_precision("ieee"):
        expected = stock(x)
        torch.testing.assert_close(ours(x), expected, atol=1e-5, rtol=1e-4)
        ours.compile(backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(ours(x), expected, atol=1e-5, rtol=1e-4)
    assert "upsample_conv: 1 of 1 layers ran the kernel at their last call" in told()
