"""Every processor against the fp32 reference, forward and gradients, on the attention shapes of real models."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pytest
import torch

from diffusers_turbo.attention import read_layer
from tests.attention.cases import DTYPES, SHAPES, Shape, every_gpu_processor, every_processor, inputs_of, layer_of
from tests.attention.reference import distance, reference

# With fewer tokens, levels that differ in nothing else are one shape.
DISTINCT_SHAPES = list({(s.heads, s.head_dim, s.context): s for s in SHAPES}.values())


@dataclass(frozen=True)
class Expected:
    """A layer in some dtype, inputs for it, and what the reference makes of both in fp32."""

    attn: Any
    inputs: list[torch.Tensor]
    weights: torch.Tensor
    output: torch.Tensor
    gradients: tuple[torch.Tensor, ...]


@lru_cache(maxsize=1)  # pytest runs all processors on a shape before the next shape
def expected(shape: Shape, dtype: torch.dtype, device: str, side: int) -> Expected:
    attn = layer_of(shape, dtype, device)
    inputs = [x.requires_grad_() for x in inputs_of(shape, dtype, device, side=side) if x is not None]
    wide = copy.deepcopy(attn).float()
    wide_inputs = [x.detach().float().requires_grad_() for x in inputs]
    output = reference(wide, *wide_inputs)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(device)
    gradients = torch.autograd.grad(output, differentiated(wide, wide_inputs), weights)
    return Expected(attn, inputs, weights.to(dtype), output.detach(), gradients)


def differentiated(attn: Any, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """The inputs, which all gradients pass on their way back, and one weight for those that stay."""
    return [*inputs, attn.to_q.weight]


def check(maker, shape, dtype, device, side):
    processor, wanted = maker(), expected(shape, dtype, device, side)
    tolerance = processor.tolerance[dtype]
    wanted.attn.set_processor(processor)
    output = wanted.attn(*wanted.inputs)
    assert output.dtype == dtype
    assert distance(output, wanted.output) < tolerance.output
    gradients = torch.autograd.grad(output, differentiated(wanted.attn, wanted.inputs), wanted.weights)
    assert max(map(distance, gradients, wanted.gradients)) < tolerance.gradient
    with torch.no_grad():
        assert distance(wanted.attn(*wanted.inputs), wanted.output) < tolerance.output


@every_processor
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", DISTINCT_SHAPES, ids=lambda shape: shape.name)
def test_agrees_with_the_reference_on_fewer_tokens(maker, shape, dtype):
    check(maker, shape, dtype, "cpu", side=4)


@pytest.mark.gpu
@every_gpu_processor
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_agrees_with_the_reference_at_full_size(maker, shape, dtype):
    layer = read_layer(shape.name, expected(shape, dtype, "cuda", shape.side).attn, grad=True)
    if maker().reasons(layer):
        pytest.skip("outside the declared limits")
    assert maker().reasons_here(layer) == []
    check(maker, shape, dtype, "cuda", side=shape.side)
