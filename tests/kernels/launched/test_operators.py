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
}
FILLED = {
    "group_norm": (1e-5, True, None, None, []),
    "geglu": ([],),
    "linear_geglu": ([],),
    "add_layer_norm": (1e-5, []),
    "bias_residual": ([],),
}
"""What follows them in the operator's schema."""

every_kernel = pytest.mark.parametrize("name", KERNELS)


def test_every_kernel_is_tried():
    assert ARGUMENTS.keys() == FILLED.keys() == KERNELS.keys()


@every_kernel
def test_the_operator_keeps_its_promises_to_the_compiler(name, device):
    operator = getattr(torch.ops.diffusers_turbo, name).default
    filled = FILLED[name]
    torch.library.opcheck(operator, (*ARGUMENTS[name](device), *filled), test_utils=("test_schema", "test_faketensor"))


@every_kernel
def test_goes_through_torch_compile_in_one_graph(name, device):
    arguments = ARGUMENTS[name](device)
    compiled = torch.compile(KERNELS[name].run, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(*arguments), KERNELS[name].run(*arguments), rtol=0, atol=0)


@every_kernel
def test_the_meta_device_is_told_shapes_and_strides(name):
    arguments = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in ARGUMENTS[name]("cpu")]
    filled = FILLED[name]
    result = getattr(torch.ops.diffusers_turbo, name)(*arguments, *filled)
    plain = KERNELS[name].plain(*arguments)
    for one, other in zip(*(x if isinstance(x, tuple) else (x,) for x in (result, plain)), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
    if name in ("group_norm", "bias_residual"):
        assert result.stride() == arguments[0].stride()
