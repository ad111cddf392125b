"""The kernels as operators of torch: what the compiler is told of them is true, and they go through it."""

from __future__ import annotations

import pytest
import torch

from diffusers_turbo.kernels import KERNELS
from tests.kernels.checking import image, randn

ARGUMENTS = {
    "group_norm": lambda device: (image(2, 12, 3, 5, device=device), 2, *randn(2, 12, device=device)),
    "geglu": lambda device: (randn(2, 3, 16, device=device),),
    "linear_geglu": lambda device: (
        randn(2, 3, 64, dtype=torch.float16, device=device),
        randn(256, 64, dtype=torch.float16, device=device),
        None,
    ),
    "add_layer_norm": lambda device: (*randn(2, 2, 3, 16, device=device), *randn(2, 16, device=device)),
    "bias_residual": lambda device: (*(image(2, 12, 3, 5, device=device) for _ in range(2)), randn(12, device=device)),
    "upsample_conv": lambda device: (
        *(image(*shape, device=device) for shape in ((2, 12, 3, 5), (8, 12, 3, 3))),
        randn(8, device=device),
    ),
}
FILLED = {
    "group_norm": (1e-5, True, None, None, []),
    "geglu": ([],),
    "linear_geglu": ([],),
    "add_layer_norm": (1e-5, []),
    "bias_residual": ([],),
}
"""What follows them in the schema of an operator that has the kernel's name and arguments."""

OPERATORS = {name: lambda device, name=name: (*ARGUMENTS[name](device), *FILLED[name]) for name in FILLED} | {
    "upsample_conv_weight": lambda device: (image(8, 12, 3, 3, device=device), []),
    "upsample_conv_interleave": lambda device: (image(2, 32, 4, 6, device=device), randn(8, device=device), []),
}

every_kernel = pytest.mark.parametrize("name", KERNELS)


def test_every_kernel_is_tried():
    assert ARGUMENTS.keys() == KERNELS.keys()
    assert {*FILLED, "upsample_conv"} == KERNELS.keys()


@pytest.mark.parametrize("name", OPERATORS)
def test_the_operator_keeps_its_promises_to_the_compiler(name, device):
    operator = getattr(torch.ops.diffusers_turbo, name).default
    torch.library.opcheck(operator, OPERATORS[name](device), test_utils=("test_schema", "test_faketensor"))


@every_kernel
def test_goes_through_torch_compile_in_one_graph(name, device):
    arguments = ARGUMENTS[name](device)
    compiled = torch.compile(KERNELS[name].run, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(*arguments), KERNELS[name].run(*arguments), rtol=0, atol=0)


@every_kernel
def test_the_meta_device_is_told_shapes_and_strides(name):
    arguments = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in ARGUMENTS[name]("cpu")]
    if name in FILLED:
        result = getattr(torch.ops.diffusers_turbo, name)(*arguments, *FILLED[name])
    else:
        with torch.no_grad():
            result = KERNELS[name].run(*arguments)
    plain = KERNELS[name].plain(*arguments)
    for one, other in zip(*(x if isinstance(x, tuple) else (x,) for x in (result, plain)), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
    if name in ("group_norm", "bias_residual"):
        assert result.stride() == arguments[0].stride()
    if name == "upsample_conv":
        assert result.is_contiguous(memory_format=torch.channels_last)
