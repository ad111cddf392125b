"""Upsampling and the convolution after it as one of the small picture, and what is left to diffusers' own forward."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers.models.upsampling import Upsample2D
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from diffusers_turbo.fused import upsampling
from tests.fused.on_cpu import fuse


class Unet(nn.Module):
    """A root with one upsampling in it."""

    def __init__(self, **changes: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = Upsample2D(8, **{"use_conv": True, "out_channels": 6} | changes)

    def forward(self, *args, **kwargs):
        return self.up(*args, **kwargs)


def laid_out(module: nn.Module) -> Any:
    return module.eval().to(memory_format=torch.channels_last)


@pytest.fixture
def pair():
    host = laid_out(Unet())
    return host, copy.deepcopy(host)


def picture(height: int = 32, width: int = 32, batch: int = 2) -> Tensor:
    x = torch.randn(batch, height, width, 8, generator=torch.Generator().manual_seed(1))
    return x.movedim(-1, 1)


X = picture()


def told(journal):
    return "\n".join(journal.told())


def ran(calls):
    return {name: count for name, count in calls.items() if count}


@pytest.mark.parametrize("name", ["conv", "Conv2d_0"])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_one_convolution_of_the_small_picture(name, bias, kernel_calls):
    host = laid_out(Unet(name=name, bias=bias))
    ours = copy.deepcopy(host)
    journal = fuse(ours)
    assert torch.equal(ours(X), host(X))
    assert torch.equal(ours(hidden_states=X, output_size=(64, 64)), host(X))
    assert torch.equal(ours(X, X.new_zeros(1, 1, 64, 64).shape[2:]), host(X))
    assert ran(kernel_calls) == {"upsample_conv": 3}
    assert "upsample_conv: 1 of 1 layers ran the kernel at their last call" in told(journal)
    journal.revert()
    assert torch.equal(ours(X), host(X))
    assert ran(kernel_calls) == {"upsample_conv": 3}
    assert "forward" not in vars(ours.up)


@torch.no_grad()
def test_a_picture_with_its_channels_outermost_is_laid_out_while_it_is_small(pair, kernel_calls):
    host, ours = pair
    fuse(ours)
    torch.testing.assert_close(ours(X.contiguous()), host(X.contiguous()))
    assert ran(kernel_calls) == {"upsample_conv": 1}


def hook(module):
    module.up.conv.register_forward_hook(lambda module, args, output: output * 2)


def offload_hook(module):
    module.up.conv._hf_hook = "a hook"


def adapter(module):
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["conv"], init_lora_weights=False), module)


def another_forward(module):
    conv = module.up.conv
    conv.forward = lambda x: conv._conv_forward(x, conv.weight, None) - 1


def another_border(module):
    module.up.conv.padding_mode = "circular"
    module.up.conv._reversed_padding_repeated_twice = [1, 1, 1, 1]


def another_stride(module):
    module.up.conv.stride = (2, 2)


@pytest.mark.parametrize("change", [hook, offload_hook, adapter, another_forward, another_border, another_stride])
@torch.no_grad()
def test_a_convolution_that_is_more_than_that_is_called(pair, change, kernel_calls):
    host, ours = pair
    journal = fuse(ours)
    for module in pair:
        torch.manual_seed(2)
        change(module)
    assert torch.equal(ours(X), host(X))
    assert ran(kernel_calls) == {}
    report = "1 layers of upsample_conv ran as upsampling and a convolution after it (unet.up): its convolution is not"
    assert report in told(journal)


class Quantised(torch.Tensor):
    """A weight that says float32 and is something else, as torchao's are."""


@torch.no_grad()
def test_a_weight_of_another_class_is_the_convolutions_own(pair, kernel_calls):
    host, ours = pair
    journal = fuse(ours)
    ours.up.conv.weight = nn.Parameter(ours.up.conv.weight.as_subclass(Quantised), requires_grad=False)
    assert torch.equal(torch.Tensor(ours(X)), host(X))
    assert ran(kernel_calls) == {}
    assert "its weight is a Quantised" in told(journal)


@torch.no_grad()
def test_where_autocast_chooses_the_dtype(pair, kernel_calls):
    host, ours = pair
    journal = fuse(ours)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(X), host(X))
    assert "autocast chooses the dtype" in told(journal)
    assert ran(kernel_calls) == {}


@pytest.mark.parametrize(
    ("x", "given", "reason"),
    [
        (picture(31, 33), {}, "on fewer than 1024 positions it would cost more than it spares"),
        (picture(16, 16, batch=9), {}, "on fewer than 1024 positions it would cost more than it spares"),
        (X, {"output_size": (63, 64)}, "it is asked for another size than twice its input's"),
    ],
)
@torch.no_grad()
def test_sizes_that_are_left_to_the_host(pair, x, given, reason, kernel_calls):
    host, ours = pair
    journal = fuse(ours)
    assert torch.equal(ours(x, **given), host(x, **given))
    assert ran(kernel_calls) == {}
    assert reason in told(journal)
    assert "plain PyTorch" not in told(journal)


@torch.no_grad()
def test_weights_with_their_channels_outermost_keep_the_bits(kernel_calls):
    host = Unet().eval()
    ours = copy.deepcopy(host)
    journal = fuse(ours)
    assert torch.equal(ours(X), host(X))
    assert ran(kernel_calls) == {}
    assert "the channels of x are not innermost" in told(journal) or "the channels of weight" in told(journal)


@torch.no_grad()
def test_weights_of_another_dtype_raise_as_in_the_host(pair, kernel_calls):
    for module in pair:
        fuse(module)
        with pytest.raises(RuntimeError, match="same"):
            module(X.double())
    assert ran(kernel_calls) == {}


class Another(Upsample2D):
    """What somebody makes of the class meanwhile."""

    def forward(self, hidden_states, output_size=None, *args, **kwargs):
        return super().forward(hidden_states) + 1


@torch.no_grad()
def test_a_module_of_another_class_by_now(pair, kernel_calls):
    host, ours = pair
    journal = fuse(ours)
    for module in pair:
        module.up.__class__ = Another
    assert torch.equal(ours(X), host(X))
    assert "it became a Another" in told(journal)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"use_conv": False, "out_channels": 8}, "an upsampling without a convolution"),
        ({"use_conv": False, "use_conv_transpose": True}, "an upsampling that is not to the nearest pixel"),
        ({"interpolate": False}, "an upsampling that is not to the nearest pixel"),
        ({"norm_type": "rms_norm", "eps": 1e-6, "elementwise_affine": True}, "an upsampling that normalises first"),
    ],
)
@torch.no_grad()
def test_other_upsamplings_are_left_and_counted(changes, reason, kernel_calls):
    host = laid_out(Unet(**changes))
    host.norm = nn.GroupNorm(2, 8)  # without a layer that fits, the switch is refused
    ours = copy.deepcopy(host)
    journal = fuse(ours)
    assert "forward" not in vars(ours.up)
    assert f"1 left to diffusers: {reason}" in "\n".join([*journal.notes, told(journal)])
    assert torch.equal(ours(X), host(X))


@torch.no_grad()
def test_a_compiler_sees_one_graph(pair, kernel_calls):
    host, ours = pair
    fuse(ours)
    compiled = torch.compile(ours, fullgraph=True, backend="eager", dynamic=True)
    for x in (X, picture(33, 36), picture(8, 8)):
        assert torch.equal(compiled(x), host(x))


class LargeAs(nn.Module):
    """Asks for the size of another tensor, as a UNet does of its skips."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x, like):
        return self.inner(x, like.shape[2:])


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@torch.no_grad()
def test_a_trace_keeps_no_size(pair, kernel_calls):
    host, ours = pair
    fuse(ours)
    doubled, less = torch.zeros(1, 1, 64, 64), torch.zeros(1, 1, 63, 63)
    traced = torch.jit.trace(LargeAs(ours), (X, doubled), check_trace=False)
    for like in (doubled, less):
        assert torch.equal(traced(X, like), host(X, like.shape[2:]))


def test_with_a_gradient(pair, kernel_calls):
    _, ours = pair
    fuse(ours)
    grads = []
    for module in pair:
        module(X).square().sum().backward()
        grads.append(module.up.conv.weight.grad)
    assert torch.equal(*grads)
    assert ran(kernel_calls) == {}


@pytest.mark.parametrize("channels", [1, 6, 63, 64, 80, 100, 320, 1281])
def test_few_channels_are_compiled_for_as_many_are(channels):
    few = upsampling._few(channels)
    assert few <= min(channels, 79)
    assert (few % 16 == 0) == (channels % 16 == 0)
    assert upsampling.upsample_conv_launch(few) == upsampling.upsample_conv_launch(channels)
