"""The feed-forward's projection and halving as one kernel, and what does the work where the kernel must not."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers.models.activations import GEGLU
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from diffusers_turbo.actions.fused_kernels import apply
from diffusers_turbo.planning.options import FusedKernels
from tests.fused.on_cpu import fuse


class Unet(nn.Module):
    """A root with one feed-forward's first half in it, wide enough for the kernel's tiles."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = GEGLU(64, 128)

    def forward(self, *args, **kwargs):
        return self.net(*args, **kwargs)


@pytest.fixture
def pair():
    host = Unet().eval()
    return host, copy.deepcopy(host)


X = torch.randn(2, 6, 64, generator=torch.Generator().manual_seed(1))


def told(journal):
    return "\n".join(line for change in journal.changes if hasattr(change, "tell") for line in change.tell())


def ran(calls):
    return {name: count for name, count in calls.items() if count}


@torch.no_grad()
def test_one_kernel_for_projection_and_halving(pair, kernel_calls):
    host, ours = pair
    journal = fuse(ours)
    assert torch.equal(ours(X), host(X))
    assert ran(kernel_calls) == {"linear_geglu": 1}
    assert "linear_geglu: 1 of 1 layers ran the kernel at their last call" in told(journal)
    journal.revert()
    assert torch.equal(ours(X), host(X))
    assert ran(kernel_calls) == {"linear_geglu": 1}


def hook(module):
    module.net.proj.register_forward_hook(lambda module, args, output: output * 2)


def adapter(module):
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["proj"], init_lora_weights=False), module)


def another_forward(module):
    proj = module.net.proj
    proj.forward = lambda x: nn.functional.linear(x, proj.weight) - 1


@pytest.mark.parametrize("change", [hook, adapter, another_forward])
@torch.no_grad()
def test_a_projection_that_is_more_than_a_linear_is_called(pair, change, kernel_calls):
    host, ours = pair
    journal = fuse(ours)
    for module in pair:
        torch.manual_seed(2)
        change(module)
    assert torch.equal(ours(X), host(X))
    assert ran(kernel_calls) == {"geglu": 1}
    assert "1 layers of linear_geglu ran as a projection and what comes after it (unet.net): its projection" in told(
        journal
    )


class Quantised(torch.Tensor):
    """A weight that says float32 and is something else, as torchao's are."""


@torch.no_grad()
def test_a_weight_of_another_class_is_the_projections_own(pair, kernel_calls):
    host, ours = pair
    journal = fuse(ours)
    ours.net.proj.weight = nn.Parameter(ours.net.proj.weight.as_subclass(Quantised), requires_grad=False)
    assert torch.equal(torch.Tensor(ours(X)), host(X))
    assert ran(kernel_calls) == {"geglu": 1}
    assert "geglu: 1 of 1 layers ran the kernel at their last call" in told(journal)


@torch.no_grad()
def test_where_autocast_chooses_the_dtype(pair, kernel_calls):
    host, ours = pair
    fuse(ours)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(X), host(X))
        assert ours(X).dtype == torch.bfloat16
    assert ran(kernel_calls) == {"geglu": 2}


@torch.no_grad()
def test_a_compiler_sees_one_graph(pair, kernel_calls):
    host, ours = pair
    fuse(ours)
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    assert torch.equal(compiled(X), host(X))


def test_with_a_gradient(pair, kernel_calls):
    _, ours = pair
    fuse(ours)
    grads = []
    for module in pair:
        module(X).square().sum().backward()
        grads.append(module.net.proj.weight.grad)
    assert torch.equal(*grads)
    assert ran(kernel_calls) == {}


@torch.no_grad()
def test_its_own_option(pair, kernel_calls):
    from types import SimpleNamespace

    host, ours = pair
    pipe = SimpleNamespace(components={"unet": ours})
    journal = apply(pipe, FusedKernels(linear_geglu=False))
    assert torch.equal(ours(X), host(X))
    assert ran(kernel_calls) == {"geglu": 1}
    journal.revert()
    apply(pipe, FusedKernels(geglu=False))
    assert torch.equal(ours(X), host(X))
    assert ran(kernel_calls) == {"geglu": 1, "linear_geglu": 1}
    # without the other kernel, what does not fit is the host's
    strided = X.repeat(1, 1, 2)[..., ::2]
    assert torch.equal(ours(strided), host(strided))
    assert ran(kernel_calls) == {"geglu": 1, "linear_geglu": 1}
