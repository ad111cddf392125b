"""The two blocks with a formula of this package: the host's result for every configuration, however the input lies."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from tests.fused.on_cpu import fuse

PLAIN: dict[str, dict[str, Any]] = {
    "shortcut": {"out_channels": 16},
    "no shortcut": {},
    "no time embedding": {"temb_channels": None},
    "of a VAE's decoder": {"temb_channels": None, "time_embedding_norm": "group"},
    "embedding activated before": {"skip_time_act": True},
    "scaled output": {"output_scale_factor": 2**0.5},
    "dropout": {"dropout": 0.5},
    "other groups": {"groups_out": 2},
    "other output": {"conv_2d_out_channels": 4},
}
"""Resnets that run by this package's formula."""

HOSTS: dict[str, dict[str, Any]] = {
    "scale and shift": {"time_embedding_norm": "scale_shift"},
    "up": {"up": True},
    "down": {"down": True},
    "up, small filter": {"up": True, "kernel": "sde_vp"},
    "mish": {"non_linearity": "mish"},
    "gelu": {"non_linearity": "gelu"},
}
"""Resnets that run by their own forward, in which only the norms are kernels."""


def resnet(**options: Any) -> ResnetBlock2D:
    torch.manual_seed(0)
    block = ResnetBlock2D(**{"in_channels": 8, "temb_channels": 12, "groups": 4} | options).eval()
    return changed_affine(block)


def changed_affine(block: Any) -> Any:
    """Norms whose weights are not the ones and zeros they start as."""
    with torch.no_grad():
        for module in block.modules():
            if isinstance(module, (nn.GroupNorm, nn.LayerNorm)) and module.weight is not None:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return block


def resnet_input(block: Any, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor | None]:
    x, temb = torch.randn(2, 8, 6, 4, dtype=dtype), torch.randn(2, 12, dtype=dtype)
    return x, None if block.time_emb_proj is None else temb


def near(ours: Tensor, host: Tensor) -> None:
    torch.testing.assert_close(ours, host, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("options", [*PLAIN.values(), *HOSTS.values()], ids=[*PLAIN, *HOSTS])
@torch.no_grad()
def test_resnets_are_the_hosts(options, kernel_calls):
    host = resnet(**options)
    ours = copy.deepcopy(host)
    fuse(ours)
    x, temb = resnet_input(host)
    expected = host(x, temb)
    assert torch.equal(ours(x, temb), expected), "what no kernel takes must be the host's to the bit"
    assert kernel_calls["group_norm"] == 0
    ours.to(memory_format=torch.channels_last)
    near(ours(x.to(memory_format=torch.channels_last), temb), expected)
    assert kernel_calls["group_norm"] == 2


@pytest.mark.parametrize("options", PLAIN.values(), ids=PLAIN)
@torch.no_grad()
def test_an_input_is_laid_out_as_the_convolution_wants_it(options, kernel_calls):
    block = resnet(**options)
    x, temb = resnet_input(block)
    expected = block(x, temb)
    fuse(block.to(memory_format=torch.channels_last))
    ours = block(x, temb)
    near(ours, expected)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    assert kernel_calls["group_norm"] == 2


def convolutions(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each convolution from now on was given a bias."""
    seen, original = [], nn.Conv2d._conv_forward

    def watched(self: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        seen.append(bias is not None)
        return original(self, x, weight, bias)

    monkeypatch.setattr(nn.Conv2d, "_conv_forward", watched)
    return seen


@torch.no_grad()
def test_both_biases_go_where_the_next_pass_is(kernel_calls, monkeypatch):
    block = resnet().to(memory_format=torch.channels_last)
    with torch.no_grad():
        for conv in (block.conv1, block.conv2):
            nn.init.normal_(conv.bias, std=3)
    x, temb = resnet_input(block)
    expected = block(x, temb)
    fuse(block)
    biased = convolutions(monkeypatch)
    near(block(x, temb), expected)
    assert biased == [False, False]
    assert kernel_calls["bias_residual"] == 1


@pytest.mark.parametrize("name", ["conv1", "conv2"])
@torch.no_grad()
def test_who_looks_at_a_convolution_sees_its_bias(name, kernel_calls):
    block = resnet().to(memory_format=torch.channels_last)
    x, temb = resnet_input(block)
    seen: list[Tensor] = []
    getattr(block, name).register_forward_hook(lambda module, given, output: seen.append(output))
    expected = block(x, temb)
    fuse(block)
    near(block(x, temb), expected)
    near(seen[1], seen[0])
    assert kernel_calls["bias_residual"] == (name != "conv2")


@pytest.mark.parametrize("options", [{}, {"out_channels": 16}, {"time_embedding_norm": "scale_shift"}], ids=str)
def test_resnets_with_a_gradient(options, kernel_calls):
    host = resnet(**options)
    ours = copy.deepcopy(host)
    fuse(ours)
    x, temb = resnet_input(host)
    x.requires_grad_()  # without it torch 2.13's group norm crashes in channels-last, in stock diffusers too
    host(x, temb).square().sum().backward()
    ours(x.to(memory_format=torch.channels_last), temb).square().sum().backward()
    assert kernel_calls["group_norm"] == 0
    for (name, one), other in zip(host.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, atol=1e-4, rtol=1e-4, msg=name)


@torch.no_grad()
def test_a_resnet_in_training_is_left_to_the_host(kernel_calls):
    """It makes its shortcut contiguous then, for gradients across processes."""
    block = resnet(out_channels=16).to(memory_format=torch.channels_last).train()
    x, temb = resnet_input(block)
    expected = block(x, temb)
    fuse(block)
    near(block(x, temb), expected)
    assert kernel_calls["group_norm"] == 1


@torch.no_grad()
def test_resnets_in_double_precision_run_plainly(kernel_calls):
    host = resnet().double()
    ours = copy.deepcopy(host)
    fuse(ours)
    x, temb = resnet_input(host, torch.float64)
    assert torch.equal(ours(x, temb), host(x, temb))
    assert kernel_calls["group_norm"] == 0


@torch.no_grad()
def test_norms_replaced_meanwhile_send_a_resnet_to_its_host(kernel_calls):
    ours = resnet()
    fuse(ours)
    x, temb = resnet_input(ours)
    x = x.to(memory_format=torch.channels_last)
    ours.norm2 = changed_affine(nn.Sequential(nn.GroupNorm(2, 8)))
    ours.norm1.forward = lambda x: 2 * x
    host = resnet()
    host.norm1.forward, host.norm2 = ours.norm1.forward, ours.norm2
    near(ours(x, temb), host(x, temb))


class Doubled(ResnetBlock2D):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return 2 * super().forward(*args, **kwargs)


@torch.no_grad()
def test_a_class_exchanged_meanwhile_is_heeded():
    """As tomesd does with transformer blocks."""
    ours = resnet()
    x, temb = resnet_input(ours)
    expected = 2 * ours(x, temb)
    fuse(ours)
    ours.__class__ = Doubled
    assert torch.equal(ours(x, temb), expected)


CROSS = {"cross_attention_dim": 12}
TRANSFORMERS: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "plain": (CROSS, {}, 2),
    "twice itself": ({"double_self_attention": True}, {"encoder_hidden_states": None}, 2),
    "no affine": (CROSS | {"norm_elementwise_affine": False}, {}, 2),
    "gelu": (CROSS | {"activation_fn": "gelu"}, {}, 2),
    "mask": (CROSS, {"encoder_attention_mask": torch.tensor([[[0.0, -1e4, 0.0, 0.0, -1e4]]]).repeat(2, 1, 1)}, 2),
    "self-attention's mask": (
        CROSS,
        {"attention_mask": torch.tensor([[[0.0, 0.0, -1e4, 0.0, 0.0, 0.0]]]).repeat(2, 1, 1)},
        2,
    ),
    "gated, not asked for": (CROSS | {"attention_type": "gated"}, {}, 2),
    # the host's own forward
    "gated": (
        CROSS | {"attention_type": "gated"},
        {"cross_attention_kwargs": {"gligen": {"objs": torch.ones(2, 3, 12)}}},
        0,
    ),
    "cross-attention only": (CROSS | {"only_cross_attention": True}, {}, 0),
    "self-attention only": ({}, {"encoder_hidden_states": None}, 0),
    "positions": (CROSS | {"positional_embeddings": "sinusoidal", "num_positional_embeddings": 8}, {}, 0),
    "scaled and shifted": (
        CROSS | {"norm_type": "ada_norm", "num_embeds_ada_norm": 10},
        {"timestep": torch.tensor(3)},
        0,
    ),
}


def transformer(**options: Any) -> BasicTransformerBlock:
    torch.manual_seed(0)
    return changed_affine(BasicTransformerBlock(16, 2, 8, **options).eval())


def transformer_input() -> dict[str, Any]:
    return {"hidden_states": torch.randn(2, 6, 16), "encoder_hidden_states": torch.randn(2, 5, 12)}


@pytest.mark.parametrize(("options", "given", "kernels"), TRANSFORMERS.values(), ids=TRANSFORMERS)
@torch.no_grad()
def test_transformer_blocks_are_the_hosts(options, given, kernels, kernel_calls):
    host = transformer(**options)
    if hasattr(host, "fuser"):
        host.fuser.alpha_attn.fill_(0.5)
    ours = copy.deepcopy(host)
    fuse(ours)
    arguments = transformer_input() | given
    near(ours(**arguments), host(**arguments))
    assert kernel_calls["add_layer_norm"] == kernels
    assert (kernel_calls["geglu"] > 0) == ("activation_fn" not in options)


@torch.no_grad()
def test_what_a_kernel_cannot_take_is_the_hosts_to_the_bit(kernel_calls):
    host = transformer(**CROSS).double()
    ours = copy.deepcopy(host)
    fuse(ours)
    arguments = {name: x.double() for name, x in transformer_input().items()}
    assert torch.equal(ours(**arguments), host(**arguments))
    assert set(kernel_calls.values()) == {0}


@torch.no_grad()
def test_a_chunked_feed_forward_is_left_to_the_host(kernel_calls):
    host = transformer(**CROSS)
    ours = copy.deepcopy(host)
    fuse(ours)
    arguments = transformer_input()
    expected = host(**arguments)
    ours.set_chunk_feed_forward(2, 1)
    near(ours(**arguments), expected)
    assert {name: calls for name, calls in kernel_calls.items() if calls} == {"geglu": 3, "layer_norm": 3}


def test_transformer_blocks_with_a_gradient(kernel_calls):
    host = transformer(**CROSS)
    ours = copy.deepcopy(host)
    fuse(ours)
    arguments = transformer_input()
    for block in (host, ours):
        block(**arguments).square().sum().backward()
    assert set(kernel_calls.values()) == {0}
    for (name, one), other in zip(host.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, msg=name)
