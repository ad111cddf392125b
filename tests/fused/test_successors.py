"""Blocks one after the other: the last sum of one is normalised for the next in the same pass, if it stays that sum."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from tests.fused.on_cpu import fuse
from tests.fused.test_blocks import changed_affine, near


def transformer(count: int = 3) -> Any:
    torch.manual_seed(0)
    made = Transformer2DModel(2, 8, in_channels=16, num_layers=count, cross_attention_dim=12, norm_num_groups=4)
    return changed_affine(made.eval())


def result_of(module: Any) -> Tensor:
    torch.manual_seed(1)
    images = torch.randn(2, 16, 3, 2).contiguous(memory_format=torch.channels_last)
    given = {"hidden_states": images, "encoder_hidden_states": torch.randn(2, 5, 12)}
    result: Tensor = module(**given, return_dict=False)[0]
    return result


@pytest.fixture
def pair():
    host = transformer()
    return host, copy.deepcopy(host)


@torch.no_grad()
def test_a_block_normalises_for_the_next(pair, kernel_calls):
    host, ours = pair
    journal = fuse(ours)
    for _ in range(2):
        near(result_of(ours), result_of(host))
    assert (kernel_calls["add_layer_norm"], kernel_calls["layer_norm"]) == (2 * (3 * 2 + 2), 2)
    assert "add_layer_norm: 9 of 9 layers ran the kernel at their last call" in journal.told()
    journal.revert()
    assert torch.equal(result_of(ours), result_of(host))


def change_in_place(block):
    block.register_forward_hook(lambda module, args, output: output.mul_(1.5))


def another_result(block):
    block.register_forward_hook(lambda module, args, output: output * 1.5)


def another_input(block):
    block.register_forward_pre_hook(lambda module, args: (args[0] + 1, *args[1:]))


@pytest.mark.parametrize(
    ("index", "change"), [(0, change_in_place), (1, another_result), (1, another_input), (2, another_input)]
)
@torch.no_grad()
def test_a_sum_that_somebody_changes_is_normalised_anew(pair, index, change, kernel_calls):
    host, ours = pair
    fuse(ours)
    for module in pair:
        change(module.transformer_blocks[index])
    near(result_of(ours), result_of(host))


@torch.no_grad()
def test_a_block_that_comes_or_goes(pair, kernel_calls):
    host, ours = pair
    fuse(ours)
    result_of(ours)
    for module in pair:
        del module.transformer_blocks[1]
    near(result_of(ours), result_of(host))
    for module in pair:
        module.transformer_blocks.insert(0, copy.deepcopy(module.transformer_blocks[-1]))
    near(result_of(ours), result_of(host))


@torch.no_grad()
def test_a_compiler_sees_one_graph(pair, kernel_calls):
    host, ours = pair
    fuse(ours)
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    near(result_of(compiled), result_of(host))
    near(result_of(ours), result_of(host))


@pytest.mark.parametrize("name", ["norm1", "norm2", "norm3"])
@torch.no_grad()
def test_who_looks_at_a_norm_sees_what_it_is_given_and_gives(pair, name, kernel_calls):
    host, ours = pair
    fuse(ours)
    seen = []
    for module in pair:
        norm = getattr(module.transformer_blocks[1], name)
        norm.register_forward_hook(lambda norm, args, output: seen.append((args[0], output)) or output * 0.5)
    near(result_of(ours), result_of(host))
    (ours_in, ours_out), (host_in, host_out) = seen
    near(ours_in, host_in)
    near(ours_out, host_out)


@torch.no_grad()
def test_weights_that_come_with_their_block(pair, kernel_calls):
    """As offload by blocks has it."""
    host, ours = pair
    fuse(ours)
    block = ours.transformer_blocks[1]
    weight = block.norm1.weight
    block.norm1.weight = nn.Parameter(weight.to("meta"))
    block.register_forward_pre_hook(lambda *_: setattr(block.norm1, "weight", weight))
    near(result_of(ours), result_of(host))
    assert kernel_calls["add_layer_norm"] == 3 * 2 + 1


@pytest.mark.parametrize("find", [lambda block: block, lambda block: block.norm1], ids=["block", "norm"])
@pytest.mark.parametrize("name", ["_hf_hook", "_diffusers_hook"])
@torch.no_grad()
def test_a_layer_under_a_hook_of_offload_is_called_in_its_turn(pair, find, name, kernel_calls):
    host, ours = pair
    fuse(ours)
    setattr(find(ours.transformer_blocks[1]), name, "a hook")
    near(result_of(ours), result_of(host))
    assert kernel_calls["add_layer_norm"] == 3 * 2 + 1


@torch.no_grad()
def test_nothing_is_kept(pair, kernel_calls):
    _, ours = pair
    fuse(ours)
    result_of(ours)
    assert [vars(block)["forward"]._handed for block in ours.transformer_blocks] == [None] * 3


def test_with_a_gradient_and_in_inference_mode_each_does_its_own(pair, kernel_calls):
    host, ours = pair
    fuse(ours)
    near(result_of(ours), result_of(host))
    before = dict(kernel_calls)
    with torch.inference_mode():
        near(result_of(ours), result_of(host))
    assert kernel_calls["add_layer_norm"] - before["add_layer_norm"] == 3 * 2
    assert kernel_calls["layer_norm"] - before["layer_norm"] == 3
