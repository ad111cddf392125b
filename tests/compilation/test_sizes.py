"""Two compilations for all sizes: of a UNet, a decoder, and of modules that show each rule by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from diffusers_turbo import turbo
from diffusers_turbo.compilation.call import WatchedCall
from diffusers_turbo.compilation.sizes import MovingAxes, Pieces, joining, smallest_step
from diffusers_turbo.parity import distance
from tests import dynamo, tiny
from tests.compilation import micro
from tests.controlled import controlled, controlled_picture

SIZES = [(8, 8), (12, 12), (8, 12), (12, 8), (16, 8), (8, 8)]
PIXELS = [(64, 64), (96, 64), (64, 128)]


def compiled(module: nn.Module, *, backend: Any = "eager") -> nn.Module:
    module._compiled_call_impl = WatchedCall.of(module, backend=backend, dynamic=None, fullgraph=False)
    return module


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


class Areas(nn.Module):
    """Depends on both sides, as a UNet does, and on the batch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(2) * x.shape[0]


@torch.no_grad()
def test_any_sizes_of_a_module():
    module, left_alone = compiled(Areas()), torch.compile(Areas(), backend="eager")
    for height, width in SIZES:
        x = torch.randn(2, 4, height, width)
        assert torch.equal(module(x), x.flatten(2) * 2)
    assert graphs() == 2
    # what it is for: Dynamo by itself needs one more when first one side changes and then the other
    dynamo.reset()
    for height, width in [(8, 8), (8, 12), (12, 8)]:
        left_alone(torch.randn(2, 4, height, width))
    assert graphs() == 3


@torch.no_grad()
def test_the_batch_moves_by_itself():
    module = compiled(Areas())
    for batch in (2, 4, 6):
        module(torch.randn(batch, 4, 8, 8))
    assert graphs() == 2
    module(torch.randn(2, 4, 12, 8))
    module(torch.randn(3, 4, 8, 12))
    assert graphs() == 3


@pytest.mark.slow
@torch.no_grad()
def test_five_sizes_of_a_unet():
    unet, context = compiled(micro.unet()), torch.randn(2, 5, tiny.CONTEXT)
    eager = micro.unet()
    eager.load_state_dict(unet.state_dict())
    for height, width in SIZES:
        sample = torch.randn(2, 4, height, width)
        got, expected = (model(sample, torch.tensor(3), encoder_hidden_states=context) for model in (unet, eager))
        torch.testing.assert_close(got.sample, expected.sample)
    assert graphs() == 2


@torch.no_grad()
def test_five_sizes_of_a_decoder():
    decoder = compiled(micro.decoder())
    for height, width in SIZES:
        latents = torch.randn(2, 4, height, width)
        torch.testing.assert_close(decoder(latents), decoder._call_impl(latents))
    assert graphs() == 2


@pytest.fixture
def symbols():
    """A backend that keeps the extents of all that a graph computes, those that are not numbers."""
    found: list[set[str]] = []

    def backend(graph: Any, inputs: Any) -> Any:
        values = [node.meta.get("example_value") for node in graph.graph.nodes]
        shapes = [value.shape for value in values if isinstance(value, torch.Tensor)]
        found.append({str(extent) for shape in shapes for extent in shape if isinstance(extent, torch.SymInt)})
        return graph.forward

    return found, backend


DIVISIONS = ("//", "/", "Mod", "floor", "**(-")


@pytest.mark.slow
@torch.no_grad()
def test_no_size_of_a_unet_is_a_quotient(symbols):
    """Inductor gives up where it has to divide a number of tokens by `(s - 1) // 2 + 1`."""
    found, backend = symbols
    pipe = turbo(tiny.sd())
    stock = [tiny.picture(pipe, height=height, width=width) for height, width in PIXELS]
    pipe.enable_channels_last()
    pipe.enable_pointwise_matmul()
    pipe.fuse_qkv_projections()
    pipe.enable_prompt_projections()
    compiled(pipe.unet, backend=backend)
    for expected, (height, width) in zip(stock, PIXELS, strict=True):
        assert distance(tiny.picture(pipe, height=height, width=width), expected).psnr_db >= 90
    first, second = found
    assert first == set()
    assert len(second) >= 8
    assert [extent for extent in second if any(division in extent for division in DIVISIONS)] == []
    # sides that are no multiples of two are compiled for themselves
    assert smallest_step(pipe.unet) == 2
    tiny.picture(pipe, height=72, width=88)
    assert found[2:] == [set()]


@pytest.mark.slow
@torch.no_grad()
def test_what_the_pieces_are_for(symbols, monkeypatch):
    found, backend = symbols
    monkeypatch.setattr("diffusers_turbo.compilation.call.smallest_step", lambda module: 1)
    unet, context = compiled(tiny.unet(), backend=backend), torch.randn(2, 5, tiny.CONTEXT)
    for side in (8, 12):
        unet(torch.randn(2, 4, side, side), torch.tensor(3), encoder_hidden_states=context)
    assert any("//" in extent for extent in found[-1])


@pytest.mark.slow
@torch.no_grad()
def test_sizes_under_a_controlnet():
    """Its residuals are of the sample's sides and their halves."""
    pipe = turbo(controlled())
    stock = [controlled_picture(pipe, height=height, width=width) for height, width in PIXELS]
    compiled(pipe.unet)
    for expected, (height, width) in zip(stock, PIXELS, strict=True):
        assert distance(controlled_picture(pipe, height=height, width=width), expected).psnr_db >= 90
    assert graphs() == 2


def test_pieces_are_what_a_module_gets_that_halves_its_sides():
    axes, context = MovingAxes(step=2), torch.empty(2, 5, 8)
    shapes = [(2, 4, 8, 8), (2, 4, 8, 12), (2, 4, 8, 10), (2, 4, 9, 8), (2, 4, 2, 8), (2, 4, 8, 8)]
    pieces = [axes.marked((torch.empty(shape), context), {})[0][0] for shape in shapes]
    assert [type(each) for each in pieces] == [torch.Tensor, Pieces, Pieces, torch.Tensor, torch.Tensor, torch.Tensor]
    assert pieces[1].tensor.shape == (2, 4, 4, 2, 6, 2)
    assert pieces[1].tensor._dynamo_weak_dynamic_indices == {2, 4}
    # the others are compiled for themselves, and so is what comes with them
    _, odd = axes.marked((torch.empty(2, 4, 9, 8), context), {"residual": torch.empty(2, 8, 5, 4)})
    assert not hasattr(pieces[3], "_dynamo_weak_dynamic_indices")
    assert not hasattr(odd["residual"], "_dynamo_weak_dynamic_indices")
    # whatever comes before it
    given = {"residuals": (torch.empty(2, 8, 4, 6),), "sample": torch.empty(2, 4, 8, 12)}
    _, named = axes.marked((), given)
    assert [type(each) for each in (named["sample"], *named["residuals"])] == [Pieces, torch.Tensor]
    picture = torch.randn(2, 4, 8, 12).contiguous(memory_format=torch.channels_last)
    (again, same), named = axes.marked((picture, context), {"residual": picture.clone()})
    joined = joining(lambda *args, **kwargs: (args, kwargs))(again, same, **named)
    assert torch.equal(joined[0][0], picture)
    assert joined[0][0].stride() == picture.stride()
    assert joined[0][0].data_ptr() == picture.data_ptr()
    assert type(named["residual"]) is torch.Tensor


def marks(*shapes: tuple[int, ...]) -> list[set[int]]:
    axes, found = MovingAxes(), []
    for shape in shapes:
        (tensor,), _ = axes.marked((torch.empty(shape),), {})
        found.append(getattr(tensor, "_dynamo_weak_dynamic_indices", set()))
    return found


def test_height_and_width_move_together_and_channels_never():
    assert marks((2, 4, 8, 8), (2, 4, 8, 12), (2, 4, 12, 12)) == [set(), {2, 3}, {2, 3}]
    assert marks((2, 4, 8, 8), (2, 8, 8, 8)) == [set(), set()]
    assert marks((2, 77, 8), (2, 154, 8), (1, 77, 8)) == [set(), {1}, {0, 1}]
    assert marks((2, 4, 3, 8, 8), (2, 4, 5, 8, 8)) == [set(), {2, 3, 4}]
    assert marks((), ()) == [set(), set()]


@torch.no_grad()
def test_the_first_size_keeps_its_own_code():
    made = []

    def backend(graph: Any, inputs: Any) -> Any:
        number = len(made)
        made.append(0)

        def run(*arguments: Any) -> Any:
            made[number] += 1
            return graph.forward(*arguments)

        return run

    module = compiled(Areas(), backend=backend)
    for side in (8, 12, 8, 8, 16):
        module(torch.randn(2, 4, side, side))
    assert made == [3, 2]


def test_the_callers_tensors_are_left_as_they_are():
    axes = MovingAxes()
    theirs, marked_by_them = torch.empty(2, 4), torch.empty(2, 4)
    torch._dynamo.mark_dynamic(marked_by_them, 1)
    plain: Any = object()
    (first, second), named = axes.marked((theirs, marked_by_them), {"nested": [theirs], "plain": plain})
    assert not [name for name in vars(theirs) if "dynamo" in name]
    assert first is not theirs
    assert first.data_ptr() == theirs.data_ptr()
    assert second is marked_by_them
    assert named["nested"][0] is not theirs
    assert named["plain"] is plain
