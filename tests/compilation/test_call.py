"""Who is to blame when a compiled call fails, and what goes on: on modules of a line, through a backend that raises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from diffusers_turbo.compilation.call import WatchedCall, tell_of


class Double(nn.Module):
    """Multiplies, which fails for matrices of other widths."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(2 * torch.eye(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


def failing(error: BaseException) -> Any:
    def backend(graph: Any, inputs: Any) -> Any:
        raise error

    return backend


def watched(backend: Any, *, must_compile: bool = False, dynamic: bool | None = None) -> WatchedCall:
    module = Double()
    call = WatchedCall.of(module, backend=backend, fullgraph=must_compile, dynamic=dynamic)
    module._compiled_call_impl = call
    return call


@torch.no_grad()
def test_a_compilers_failure_gives_the_eager_result_a_warning_and_no_second_try(caplog):
    tries = []

    def backend(graph: Any, inputs: Any) -> Any:
        tries.append(graph)
        raise AssertionError("no such instruction")

    call = watched(backend)
    ones = torch.ones(2, 3)
    assert torch.equal(call.module(ones), 2 * ones)
    assert torch.equal(call.module(torch.ones(5, 3)), 2 * torch.ones(5, 3))
    assert len(tries) == 1
    assert "Double runs eagerly from now on, since compiling it failed" in caplog.text
    assert "no such instruction" in caplog.text
    assert "1 of 1 run eagerly, since compiling failed: Double: " in tell_of([call])[-1]


@torch.no_grad()
def test_a_failure_that_shows_when_the_compiled_code_first_runs_is_the_compilers_too():
    def wrong_strides(*inputs: Any) -> Any:
        raise AssertionError("expected size 16==16, stride 1==64 at dim=1")

    call = watched(lambda graph, inputs: wrong_strides)
    assert torch.equal(call.module(torch.ones(2, 3)), 2 * torch.ones(2, 3))
    assert "stride 1==64" in str(call.failure)


@torch.no_grad()
def test_with_must_compile_the_error_goes_through():
    call = watched(failing(AssertionError("no such instruction")), must_compile=True)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="no such instruction"):
        call.module(torch.ones(2, 3))
    assert call.compiled is not None
    assert call.failure is None


@torch.no_grad()
def test_a_wrong_shape_is_the_callers_and_the_compiled_call_stays():
    call = watched("eager")
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied") as eagerly:
        call.eager(torch.ones(2, 4))
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied") as compiled:
        call.module(torch.ones(2, 4))
    assert (type(compiled.value), str(compiled.value)) == (type(eagerly.value), str(eagerly.value))
    assert call.failure is None
    assert torch.equal(call.module(torch.ones(2, 3)), 2 * torch.ones(2, 3))
    assert call.counts.compiled == 1


@torch.no_grad()
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError("host memory")])
def test_missing_memory_is_not_the_compilers(error, caplog):
    call = watched(failing(error))
    with pytest.raises(Exception, match="memory"):
        call.module(torch.ones(2, 3))
    assert call.failure is None
    assert "eagerly" not in caplog.text


@torch.no_grad()
def test_an_interrupt_goes_through():
    call = watched(failing(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        call.module(torch.ones(2, 3))
    assert call.failure is None


@torch.no_grad()
def test_an_error_in_a_call_that_compiled_nothing_is_not_tried_again():
    runs = []

    def compiled(x: torch.Tensor) -> torch.Tensor:
        runs.append(x)
        raise ValueError("at run time")

    call = WatchedCall(Double(), compiled, axes=None, must_compile=False)
    with pytest.raises(ValueError, match="at run time"):
        call(torch.ones(2, 3))
    assert len(runs) == 1
    assert call.failure is None


@torch.no_grad()
def test_the_recompile_limit_is_told(caplog):
    call = watched("eager", dynamic=False)
    limit = torch._dynamo.config.recompile_limit
    for size in range(2, limit + 2):
        call.module(torch.ones(size, 3))
    assert tell_of([call]) == [f"{limit} compilations in 1 module so far"]
    call.module(torch.ones(limit + 2, 3))
    assert f"beyond {limit} variants (torch._dynamo.config.recompile_limit) calls run eagerly" in tell_of([call])[1]


def test_gradients_reach_the_callers_tensors():
    call = watched("eager")
    x = torch.ones(2, 3, requires_grad=True)
    call.module(x).sum().backward()
    assert torch.equal(x.grad, 2 * torch.ones(2, 3))
