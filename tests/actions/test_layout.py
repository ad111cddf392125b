"""channels_last: activations keep the layout from the first convolution to the last, transformers included."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_turbo import turbo
from diffusers_turbo.actions.layout import OUTPUT
from diffusers_turbo.parity import distance
from tests import tiny
from tests.state import differences, state_of


def sd2() -> Any:
    """Transformers with linear projections, whose pictures are made outside of a convolution."""
    pipe = tiny.sd()
    pipe.unet = tiny.unet(use_linear_projection=True)
    return pipe


PIPELINES = pytest.mark.parametrize("make", [tiny.sd, sd2, tiny.sdxl], ids=lambda make: make.__name__)


class Layouts(TorchDispatchMode):
    """Notes each copy of a picture `[B, C, H, W]` to the layout with its channels outermost."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        copied = func is torch.ops.aten.clone.default and isinstance(result, Tensor) and result.ndim == 4
        if copied and result.is_contiguous() and not args[0].is_contiguous():
            self.copies.append(tuple(result.shape))
        return result


def copies(unet: Any) -> list[tuple[int, ...]]:
    seen: list[tuple[int, ...]] = []
    blocks = [module for module in unet.modules() if type(module).__name__ == "Transformer2DModel"]
    assert blocks
    context = torch.randn(2, tiny.TOKENS, tiny.CONTEXT)
    for block in blocks:
        x = torch.randn(2, block.config.in_channels, 8, 8).to(memory_format=torch.channels_last)
        with torch.no_grad(), Layouts() as layouts:
            (output,) = block(x, encoder_hidden_states=context, return_dict=False)
        seen += [shape for shape in layouts.copies if shape == tuple(output.shape)]
        if OUTPUT in vars(block):
            assert output.is_contiguous(memory_format=torch.channels_last)
    return seen


@pytest.mark.parametrize("make", [tiny.sd, sd2], ids=lambda make: make.__name__)
def test_transformers_copy_no_picture(make):
    pipe = turbo(make())
    stock = copy.deepcopy(pipe.unet).to(memory_format=torch.channels_last)
    assert copies(stock), "nothing to spare"
    pipe.enable_channels_last()
    assert copies(pipe.unet) == []


@PIPELINES
def test_the_picture_and_undo(make):
    pipe = turbo(make())
    stock, before = tiny.picture(pipe), state_of(pipe)
    pipe.enable_channels_last()
    assert any(OUTPUT in vars(module) for module in pipe.unet.modules())
    assert distance(tiny.picture(pipe), stock).psnr_db >= 90
    assert "leave their pictures in that layout" in str(pipe.turbo_report())
    assert pipe.turbo_undo().left_alone == ()
    assert differences(before, state_of(pipe)) == []
    assert torch.equal(tiny.picture(pipe), stock)


def test_what_somebody_else_put_there_is_left_alone():
    pipe = turbo(tiny.sd())
    block = pipe.unet.mid_block.attentions[0]
    theirs = block._get_output_for_continuous_inputs
    block._get_output_for_continuous_inputs = theirs
    pipe.enable_channels_last()
    assert vars(block)[OUTPUT] is theirs
    pipe.turbo_undo()
    assert vars(block)[OUTPUT] is theirs
