"""The last norm of UNets and of a VAE's halves with its SiLU: applied once, whatever is replaced meanwhile."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor, nn
from torch.nn import functional as F

from diffusers_turbo.fused.layers import SiLUDone
from tests import tiny
from tests.fused.on_cpu import fuse


def changed_affine(model: Any) -> Any:
    with torch.no_grad():
        nn.init.normal_(model.conv_norm_out.weight)
    return model


def text_unet(**changes: Any) -> Any:
    return tiny.unet(
        block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), **changes
    )


def image_unet() -> Any:
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    return UNet2DModel(sample_size=8, block_out_channels=(32,), layers_per_block=1, norm_num_groups=8, **blocks).eval()


def of_unet(model: Any) -> Tensor:
    return model(torch.randn(1, 4, 8, 8), 3, torch.randn(1, 5, tiny.CONTEXT)).sample


MODELS: dict[str, tuple[Callable[[], Any], Callable[[Any], Tensor]]] = {
    "UNet": (text_unet, of_unet),
    "UNet with linear projections": (lambda: tiny.unet(use_linear_projection=True), of_unet),
    "UNet on images alone": (image_unet, lambda model: model(torch.randn(1, 3, 8, 8), 3).sample),
    "decoder": (lambda: tiny.vae().decoder, lambda model: model(torch.randn(1, 4, 8, 8))),
    "encoder": (lambda: tiny.vae().encoder, lambda model: model(torch.randn(1, 3, 32, 32))),
}
every_model = pytest.mark.parametrize(("make", "call"), MODELS.values(), ids=MODELS)


def run(call: Callable[[Any], Tensor], model: Any) -> Tensor:
    torch.manual_seed(0)
    return call(model)


def near(ours: Tensor, host: Tensor) -> None:
    torch.testing.assert_close(ours, host, atol=1e-5, rtol=1e-4)


@every_model
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@torch.no_grad()
def test_the_hosts_result(make, call, layout, kernel_calls):
    host = changed_affine(make())
    ours = copy.deepcopy(host).to(memory_format=layout)
    journal = fuse(ours)
    assert isinstance(ours.conv_act.forward, SiLUDone)
    expected = run(call, host)
    near(run(call, ours), expected)
    if layout == torch.channels_last:
        assert ours.conv_norm_out.forward.refused == ()
        assert kernel_calls["group_norm"] > 5
    else:  # what comes from an attention layer of a VAE lies channels-last all the same
        assert kernel_calls["group_norm"] < 5
    journal.revert()
    assert not any("forward" in vars(module) for module in ours.modules())


@torch.no_grad()
def test_an_activation_is_never_lost_when_its_norm_goes():
    ours = text_unet()
    fuse(ours)
    expected = run(of_unet, ours)
    theirs = copy.deepcopy(ours.conv_norm_out)
    del theirs.forward
    ours.conv_norm_out = theirs
    near(run(of_unet, ours), expected)
    ours.conv_norm_out.forward = lambda x: F.group_norm(x, theirs.num_groups, theirs.weight, theirs.bias, theirs.eps)
    near(run(of_unet, ours), expected)


@torch.no_grad()
def test_an_activation_that_is_hooked_already_keeps_the_norm_apart():
    """The pair goes together or not at all: neither none nor two SiLUs."""
    ours = text_unet()
    expected = run(of_unet, ours)
    ours.conv_act.forward = F.silu
    fuse(ours)
    assert ours.conv_act.forward is F.silu
    near(run(of_unet, ours), expected)


@pytest.mark.parametrize("changes", [{"act_fn": "gelu"}, {"act_fn": "mish"}, {"norm_num_groups": None}], ids=str)
@torch.no_grad()
def test_other_tails_are_left(changes):
    # without a last norm the blocks need their groups from elsewhere, as diffusers then fails to make them
    host = text_unet(**{k: v for k, v in changes.items() if v is not None})
    if "norm_num_groups" in changes:
        host.conv_norm_out = None
    ours = copy.deepcopy(host)
    fuse(ours)
    assert "forward" not in vars(ours.conv_act)
    near(run(of_unet, ours), run(of_unet, host))
