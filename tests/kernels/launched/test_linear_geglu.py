"""GEGLU with its projection, against plain PyTorch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from diffusers_turbo.kernels.base import interpreting
from diffusers_turbo.kernels.linear_geglu import PERSISTENT, SINGLE, linear_geglu
from tests.kernels.checking import check, randn

# the interpreter multiplies the bits of bfloat16 as if they were integers
HALF = (torch.float16,) if interpreting() else (torch.float16, torch.bfloat16)
SMALL = replace(SINGLE, rows=16, columns=32, together=2)


@pytest.fixture(autouse=True)
def _numbers_of_programs_are_loop_bounds(monkeypatch):
    """Let the interpreter's loops begin at a program's number, an array of one element, which NumPy takes for none."""
    if not interpreting():
        return
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)


def projection(depth, width, *, dtype, device, bias=True):
    weight = randn(2 * width, depth, dtype=dtype, device=device, seed=1) * depth**-0.5
    return (weight, randn(2 * width, dtype=dtype, device=device, seed=2)) if bias else (weight,)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("shape", "width"), [((2, 3, 64), 128), ((1, 40, 128), 128), ((64,), 256)], ids=str)
def test_agrees(shape, width, bias, dtype, device):
    x = randn(*shape, dtype=dtype, device=device)
    check("linear_geglu", x, *projection(shape[-1], width, dtype=dtype, device=device, bias=bias))


@pytest.mark.parametrize("rows", [1, 16, 40, 100])
@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("together", [1, 3])
def test_any_number_of_rows_and_order_of_tiles(rows, persistent, together, device):
    launch = replace(SMALL, persistent=persistent, together=together)
    x = randn(rows, 128, dtype=torch.float16, device=device)
    check("linear_geglu", x, *projection(128, 128, dtype=torch.float16, device=device), launch=launch)


@pytest.mark.parametrize("launch", [PERSISTENT, SINGLE], ids=["persistent", "single"])
def test_the_two_ways_that_are_chosen_between(launch, device):
    x = randn(150, 64, dtype=torch.float16, device=device)
    check("linear_geglu", x, *projection(64, 256, dtype=torch.float16, device=device), launch=launch)


def test_gates_from_far_below_zero_to_far_above(device):
    """Values are one, gates are what is projected by the identity."""
    gate = torch.linspace(-12, 12, 64 * 20, device=device).half().view(20, 64)
    eye = torch.eye(64, device=device).half()
    weight = torch.cat([torch.zeros_like(eye).repeat(2, 1), eye.repeat(2, 1)])
    bias = torch.cat([torch.ones(128), torch.zeros(128)]).half().to(device)
    check("linear_geglu", gate, weight, bias)


def test_tensors_that_begin_anywhere(device):
    x = randn(5 * 64 + 4, dtype=torch.float16, device=device)[4:].view(5, 64)
    weight, bias = projection(64, 128, dtype=torch.float16, device=device)
    moved = torch.cat([weight.flatten()[:1], weight.flatten()])[1:].view_as(weight)
    assert x.data_ptr() % 16
    assert moved.data_ptr() % 16
    check("linear_geglu", x, moved, bias)


def test_of_nothing(device):
    weight = torch.ones(256, 64, device=device, dtype=torch.float16)
    assert linear_geglu(torch.empty(2, 0, 64, device=device, dtype=torch.float16), weight).shape == (2, 0, 128)
