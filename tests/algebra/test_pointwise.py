"""1x1 convolutions as matrix products: where channels are innermost, and only there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from diffusers_turbo import turbo
from diffusers_turbo.actions.pointwise import PointwiseProduct, is_pointwise
from diffusers_turbo.errors import NotSupportedError
from diffusers_turbo.parity import distance
from tests import tiny


class Convolutions(TorchFunctionMode):
    """Counts convolutions of single pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.conv2d and args[1].shape[-2:] == (1, 1)
        return func(*args, **(kwargs or {}))


def convolutions(pipe: Any) -> int:
    with Convolutions() as counted:
        tiny.picture(pipe)
    return counted.count


def test_none_is_left_in_channels_last_and_all_are_in_channels_first():
    pipe = turbo(tiny.sd())
    before, stock = convolutions(pipe), tiny.picture(pipe)
    assert before > 20
    pipe.enable_pointwise_matmul()
    pipe.enable_channels_last()
    assert distance(tiny.picture(pipe), stock).psnr_db >= 110
    last = convolutions(pipe)
    pipe.disable_channels_last()
    # a few activations have channels innermost in either layout: images of one channel or pixel, transposed tokens
    assert last < convolutions(pipe) <= before
    pipe.disable_pointwise_matmul()
    assert convolutions(pipe) == before


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_same_sums(bias, dtype):
    torch.manual_seed(0)
    conv = nn.Conv2d(24, 40, 1, bias=bias).to(dtype)
    x = torch.randn(2, 24, 5, 7, dtype=dtype)
    last = x.to(memory_format=torch.channels_last)
    ours = PointwiseProduct(conv)(last)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float64: 1e-14}[dtype]
    torch.testing.assert_close(ours, conv(last), atol=tolerance, rtol=tolerance)
    assert torch.equal(PointwiseProduct(conv)(x), conv(x))


def test_gradients_and_changed_weights_go_through():
    conv = nn.Conv2d(4, 6, 1)
    x = torch.randn(1, 4, 3, 3).to(memory_format=torch.channels_last)
    PointwiseProduct(conv)(x).sum().backward()
    ours, conv.weight.grad = conv.weight.grad, None
    conv(x).sum().backward()
    torch.testing.assert_close(ours, conv.weight.grad)
    with torch.no_grad():
        conv.weight.mul_(3)
    torch.testing.assert_close(PointwiseProduct(conv)(x), conv(x))


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 4, 3),
        nn.Conv2d(4, 4, 1, stride=2),
        nn.Conv2d(4, 4, 1, padding=1),
        nn.Conv2d(4, 4, 1, groups=2),
        type("Own", (nn.Conv2d,), {})(4, 4, 1),
    ],
    ids=["3x3", "strided", "padded", "grouped", "somebody's own"],
)
def test_other_convolutions_stay(conv):
    assert not is_pointwise(conv)


def test_a_lora_around_a_convolution():
    from peft import LoraConfig

    pictures = []
    for switch in (False, True):
        pipe = turbo(tiny.sd())
        pipe.enable_channels_last()
        if switch:
            pipe.enable_pointwise_matmul()
        torch.manual_seed(0)
        pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["proj_in", "conv_shortcut"], init_lora_weights=False))
        pictures.append(tiny.picture(pipe))
    assert distance(*pictures).psnr_db >= 110


def test_refused_where_there_is_none():
    pipe = tiny.pixart()
    pipe.vae = tiny.vae(use_quant_conv=False, use_post_quant_conv=False, block_out_channels=(16, 16, 16, 16))
    with pytest.raises(NotSupportedError, match=r"enable_pointwise_matmul\(\): found no 1x1 convolution"):
        turbo(pipe).enable_pointwise_matmul()
