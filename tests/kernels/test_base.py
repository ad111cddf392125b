"""What holds without launching anything: imports, stated limits, reasons, refusals, rules. No Triton needed."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from dataclasses import astuple

import pytest
import torch

from diffusers_turbo.errors import NotSupportedError
from diffusers_turbo.kernels import KERNELS, base, is_available, unavailable
from diffusers_turbo.kernels.add_layer_norm import add_layer_norm_launch, add_layer_norm_reasons
from diffusers_turbo.kernels.geglu import geglu_launch, geglu_reasons
from diffusers_turbo.kernels.group_norm import (
    HELD_SLOTS,
    MOST_TILES,
    SINGLE_SLOTS,
    WIDE,
    GroupNormLaunch,
    group_norm,
    group_norm_launch,
    group_norm_reasons,
)
from diffusers_turbo.kernels.linear_geglu import PERSISTENT, SINGLE, linear_geglu_launch, linear_geglu_reasons
from diffusers_turbo.kernels.upsample_conv import upsample_conv, upsample_conv_launch, upsample_conv_reasons
from tests.kernels.checking import image

every_kernel = pytest.mark.parametrize("name", KERNELS)


@pytest.fixture
def runs_here(monkeypatch):
    """Pretend that kernels run on this machine, so that what is left to say is about the arguments."""
    monkeypatch.setattr(base, "triton_reasons", lambda: ())
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def run(code: str) -> str:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment
    ).stdout


def test_triton_is_first_imported_by_a_kernel_and_missed_by_name():
    files = (
        "add_layer_norm, base, bias_residual, geglu, group_norm, group_norm_device, lazy, linear_geglu, registry, "
        "upsample_conv"
    )
    code = f"""
import sys
from diffusers_turbo.kernels import {files}, is_available, unavailable
print("triton" in sys.modules)
sys.modules["triton"] = None
import torch
from diffusers_turbo.kernels.geglu import geglu
print(is_available(), unavailable())
try:
    geglu(torch.ones(2))
except Exception as error:
    print(type(error).__name__, error)
"""
    imported, available, error = run(code).splitlines()
    assert imported == "False"
    assert available.startswith("False ['Triton ")
    assert error.startswith("NotSupportedError the Triton kernel geglu: found Triton ")


@every_kernel
def test_a_kernel_and_its_plain_equal_take_the_same_arguments(name):
    kernel = KERNELS[name]
    functions = (kernel.run, kernel.plain, kernel.reasons, kernel.misfits)
    run, plain, reasons, misfits = (inspect.signature(x).parameters for x in functions)
    assert [*plain, "launch"] == list(run) == list(reasons) == list(misfits)
    assert {k: v.default for k, v in plain.items()} == {k: v.default for k, v in run.items() if k != "launch"}


@every_kernel
def test_a_kernel_states_its_limits(name):
    kernel = KERNELS[name]
    assert kernel.limits.kernel == name
    assert set(kernel.limits.dtypes) == set(kernel.tolerance)
    assert {field for field in vars(kernel.limits) if "sm" in field} <= set(kernel.limits.sources)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_on_a_cpu(monkeypatch):
    monkeypatch.setattr(base, "triton_reasons", lambda: ())
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert unavailable() == ["there is no CUDA device"]
    assert not is_available()
    assert "group_norm runs on NVIDIA GPUs, the tensor is on cpu" in group_norm_reasons(image(1, 4, 2, 2), 2)


def test_interpreted_is_available(runs_here):
    assert is_available()
    assert group_norm_reasons(image(1, 4, 2, 2), 2) == []


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: (torch.ones(2, 4, 3, 3), 2), "channels are not innermost in memory"),
        (lambda: (image(2, 4, 3, 3), 3), "4 channels do not divide into 3 groups"),
        (lambda: (image(2, 4, 3, 3), 0), "4 channels do not divide into 0 groups"),
        (lambda: (torch.ones(4), 2), r"\[B, C, ..\], the shape is \[4\]"),
        (lambda: (image(2, 4, 3, 3).double(), 2), "takes float32 or float16 or bfloat16, the tensor is float64"),
        (lambda: (image(2, 4, 3, 3), 2, torch.ones(3)), r"weight must be \[4\], it is \[3\]"),
        (lambda: (image(2, 4, 3, 3), 2, None, torch.ones(4).double()), "bias is float64"),
        (lambda: (image(2, 4, 3, 3), 2, torch.ones(8)[::2]), "weight is not contiguous"),
        (lambda: (image(2, 4, 3, 3).requires_grad_(), 2), "has no gradient, and autograd is recording one"),
    ],
)
def test_group_norm_refuses(make, text, runs_here):
    with pytest.raises(NotSupportedError, match=f"the Triton kernel group_norm: found .*{text}.*group_norm_plain"):
        group_norm(*make())


def test_an_embedding_must_fit(runs_here):
    assert group_norm_reasons(image(2, 4, 3, 3), 2, add=torch.ones(4)) == ["add must be [2, 4], it is [4]"]
    assert group_norm_reasons(image(2, 4, 3, 3), 2, add=torch.ones(2, 8)[:, ::2]) == ["add is not contiguous"]
    assert group_norm_reasons(image(2, 4, 3, 3), 2, add=torch.ones(2, 9)[:, 3:7]) == []


def test_weights_must_be_where_the_activations_are(runs_here):
    weight = torch.ones(4, device="meta")
    assert group_norm_reasons(image(2, 4, 3, 3), 2, weight) == ["weight is on meta, the activations are on cpu"]


def test_what_needs_a_gradient_is_taken_where_none_is_recorded(runs_here):
    with torch.no_grad():
        assert group_norm_reasons(image(1, 4, 2, 2).requires_grad_(), 2) == []


def test_geglu_refuses(runs_here):
    assert geglu_reasons(torch.ones(2, 3)) == ["geglu halves the last dimension, the shape is [2, 3]"]
    assert geglu_reasons(torch.ones(4, 2).T) == ["the tensor is not contiguous"]


def test_add_layer_norm_refuses(runs_here):
    wide = torch.ones(1, 9000)
    assert add_layer_norm_reasons(wide, wide) == ["add_layer_norm takes rows up to 8192, these have 9000"]
    x = torch.ones(2, 4)
    assert add_layer_norm_reasons(x, x[:1]) == ["residual must be [2, 4], it is [1, 4]"]
    assert add_layer_norm_reasons(x, x.half()) == ["x is torch.float32 and residual torch.float16"]
    assert add_layer_norm_reasons(x, x, torch.ones(2)) == ["weight must be [4], it is [2]"]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda x, w, b: (x.T, w, b), "[256, 64] does not project [64, 8]"),
        (lambda x, w, b: (x[0, 0], w, b), "[256, 64] does not project []"),
        (lambda x, w, b: (x, w[:192], b[:192]), "weight is [192, 64]: K must be a multiple of 64, 2D of 256"),
        (lambda x, w, b: (x[:, :32], w[:, :32], b), "weight is [256, 32]: K must be a multiple of 64, 2D of 256"),
        (lambda x, w, b: (x, w.bfloat16(), b), "x is torch.float16 on cpu, weight torch.bfloat16 on cpu"),
        (lambda x, w, b: (x.repeat(1, 2)[:, ::2], w, b), "x is not contiguous"),
        (lambda x, w, b: (x, w.repeat(1, 2)[:, ::2], b), "weight is not contiguous"),
        (lambda x, w, b: (x, w, b[:128]), "bias must be [256], it is [128]"),
        (lambda x, w, b: (x.float(), w.float(), b), "linear_geglu takes float16 or bfloat16, the tensor is float32"),
        (lambda x, w, b: (x.requires_grad_(), w, b), "linear_geglu has no gradient, and autograd is recording one"),
    ],
)
def test_linear_geglu_refuses(make, text, runs_here):
    x, weight, bias = torch.ones(8, 64).half(), torch.ones(256, 64).half(), torch.ones(256).half()
    assert linear_geglu_reasons(x, weight, bias) == []
    assert text in linear_geglu_reasons(*make(x, weight, bias))


def test_linear_geglu_is_for_hopper():
    limits = KERNELS["linear_geglu"].limits
    assert base.dtype_reasons(limits, torch.float16, (9, 0)) == []
    assert base.dtype_reasons(limits, torch.float16, (8, 9)) == [
        "linear_geglu in float16 needs SM 9.0, the GPU has 8.9"
    ]
    assert base.dtype_reasons(limits, torch.bfloat16, (10, 0)) == [
        "linear_geglu is for GPUs up to SM 9.0, this one has 10.0"
    ]


@pytest.mark.parametrize(
    ("rows", "width", "expected"),
    [(8192, 1280, PERSISTENT), (2048, 5120, PERSISTENT), (2048, 2560, PERSISTENT), (512, 5120, SINGLE)],
)
def test_large_tiles_are_for_much_work(rows, width, expected):
    assert linear_geglu_launch(rows, width, 132) == expected


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda x, w, b: (x[0], w, b), "takes [B, I, H, W] and [O, I, 3, 3], not [4, 5, 6], [8, 4, 3, 3]"),
        (lambda x, w, b: (x[:, :3], w, b), "takes [B, I, H, W] and [O, I, 3, 3], not [2, 3, 5, 6], [8, 4, 3, 3]"),
        (lambda x, w, b: (x, w[..., :2], b), "takes [B, I, H, W] and [O, I, 3, 3], not [2, 4, 5, 6], [8, 4, 3, 2]"),
        (lambda x, w, b: (x.contiguous(), w, b), "the channels of x are not innermost in memory"),
        (lambda x, w, b: (x, w.contiguous(), b), "the channels of weight are not innermost in memory"),
        (lambda x, w, b: (x, w.half(), b), "x is torch.float32 on cpu, weight torch.float16 on cpu"),
        (lambda x, w, b: (x, w, b[:4]), "bias must be [8], it is [4]"),
        (lambda x, w, b: (x.double(), w.double(), b), "takes float32 or float16 or bfloat16, the tensor is float64"),
        (lambda x, w, b: (x, w.requires_grad_(), b), "upsample_conv has no gradient, and autograd is recording one"),
    ],
)
def test_upsample_conv_refuses(make, text, runs_here):
    x, weight, bias = image(2, 4, 5, 6), image(8, 4, 3, 3), torch.ones(8)
    assert upsample_conv_reasons(x, weight, bias) == []
    arguments = make(x, weight, bias)
    assert text in "; ".join(upsample_conv_reasons(*arguments))
    with pytest.raises(NotSupportedError, match=f"upsample_conv: found .*{re.escape(text)}.*upsample_conv_plain"):
        upsample_conv(*arguments)


def test_bfloat16_needs_ampere():
    limits = KERNELS["geglu"].limits
    assert base.dtype_reasons(limits, torch.bfloat16, (8, 0)) == []
    assert base.dtype_reasons(limits, torch.bfloat16, (7, 5)) == ["geglu in bfloat16 needs SM 8.0, the GPU has 7.5"]
    assert base.dtype_reasons(limits, torch.float16, (6, 1)) == ["geglu in float16 needs SM 7.0, the GPU has 6.1"]


@pytest.mark.parametrize("channels", [1, 33, 128, 320, 2560])
@pytest.mark.parametrize("side", [1, 8, 12, 31, 64, 512, 4096])
def test_the_rule_of_group_norm(channels, side):
    launch = group_norm_launch(channels, side * side, 1)
    assert launch.split == (channels * side * side > (2 * SINGLE_SLOTS if channels >= WIDE else SINGLE_SLOTS))
    assert launch.held == (channels * side * side <= max(HELD_SLOTS))
    assert not launch.held or launch.block >= channels * side * side
    assert launch.tile_rows % launch.rows == 0
    assert -(-side * side // launch.tile_rows) <= MOST_TILES
    assert all(is_power_of_two(n) for n in (launch.block, launch.rows, launch.columns, launch.warps, launch.tile_warps))
    assert launch.columns >= min(channels, 64)


@pytest.mark.parametrize("width", [1, 2, 320, 640, 1280, 3000, 8192])
def test_the_rules_of_rows(width):
    rules = (geglu_launch, add_layer_norm_launch, upsample_conv_launch)
    numbers = [number for rule in rules for number in astuple(rule(width))]
    assert all(is_power_of_two(n) for n in numbers)


def test_a_launch_survives_the_operator():
    launch = GroupNormLaunch(split=True, block=1, warps=2, rows=3, columns=4, tile_rows=5, tile_warps=6)
    assert base.launch_from(GroupNormLaunch, [int(n) for n in astuple(launch)]) == launch


def is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


def test_where_a_kernel_runs_is_known_beforehand(monkeypatch, runs_here):
    kernel = KERNELS["geglu"]
    assert kernel.places() == {("cpu", dtype) for dtype in base.DTYPES}
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: [(9, 0), (7, 5)][index])
    assert kernel.places() == {("cuda", torch.float16), ("cuda", torch.float32)}
    assert KERNELS["linear_geglu"].places() == frozenset()  # a pipeline may be moved to the other GPU
    monkeypatch.setattr(base, "triton_reasons", lambda: ("Triton is not installed",))
    assert kernel.places() == frozenset()


def test_plans_know_where_the_kernels_start():
    from diffusers_turbo.planning.tiers import LOWEST_SM

    assert min(kernel.limits.lowest_sm for kernel in KERNELS.values()) == LOWEST_SM
