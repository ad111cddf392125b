"""Fused projections take no memory, follow whatever happens to the separate ones, and are in no checkpoint."""

from __future__ import annotations

import copy

import pytest
import torch

from diffusers_turbo import turbo
from diffusers_turbo.actions.projections import join
from diffusers_turbo.attention import attention_layers
from tests import tiny
from tests.state import differences, state_of


@pytest.fixture
def fused():
    pipe = turbo(tiny.sd())
    pipe.fuse_qkv_projections()
    return pipe


def _bytes(module):
    storages = [tensor.untyped_storage() for tensor in (*module.parameters(), *module.buffers())]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _layer(pipe):
    return next(attn for attn in attention_layers(pipe.unet).values() if not attn.is_cross_attention)


def test_nothing_is_stored_twice(fused):
    stock = tiny.sd()
    for name in ("unet", "vae"):
        assert _bytes(getattr(fused, name)) == _bytes(getattr(stock, name))
    assert _layer(fused).to_qkv.weight.data_ptr() == _layer(fused).to_q.weight.data_ptr()


def test_the_picture_is_that_of_separate_projections(fused):
    assert torch.allclose(tiny.picture(fused), tiny.picture(tiny.sd()), atol=1e-5)


def test_undoing_gives_each_weight_memory_of_its_own():
    pipe = turbo(tiny.sd())
    before = state_of(pipe)
    pipe.fuse_qkv_projections()
    pipe.unfuse_qkv_projections()
    assert differences(before, state_of(pipe)) == []
    layer = _layer(pipe)
    for projection in (layer.to_q, layer.to_k, layer.to_v):
        assert projection.weight.untyped_storage().nbytes() == projection.weight.nbytes


def test_checkpoints_are_those_of_stock(fused, tmp_path):
    stock = tiny.sd()
    assert list(fused.unet.state_dict()) == list(stock.unet.state_dict())
    fused.unet.save_pretrained(tmp_path)
    loaded = type(stock.unet).from_pretrained(tmp_path)
    assert all(torch.equal(found, stock.unet.state_dict()[name]) for name, found in loaded.state_dict().items())


def test_a_checkpoint_loaded_meanwhile_is_in_the_picture(fused):
    other = tiny.sd()
    with torch.no_grad():
        for weight in other.unet.parameters():
            weight.mul_(0.9)
    fused.unet.load_state_dict(other.unet.state_dict())
    other = turbo(other)
    other.fuse_qkv_projections()
    assert torch.equal(tiny.picture(fused), tiny.picture(other))


def test_undoing_takes_apart_what_is_still_joined(fused):
    layer = _layer(fused)
    layer.to_k.weight.data = layer.to_k.weight.data * 0.5
    fused.turbo_undo()
    for projection in (layer.to_q, layer.to_k, layer.to_v):
        assert projection.weight.untyped_storage().nbytes() == projection.weight.nbytes


def _exchange_data(pipe):
    for layer in attention_layers(pipe.unet).values():
        layer.to_k.weight.data = layer.to_k.weight.data * 0.5


def _change_in_place(pipe):
    with torch.no_grad():
        for layer in attention_layers(pipe.unet).values():
            layer.to_k.weight.mul_(0.5)


@pytest.mark.parametrize("change", [_exchange_data, _change_in_place])
def test_a_weight_changed_meanwhile_is_in_the_picture_and_stays_after_undo(fused, change):
    stock = tiny.sd()
    change(stock)
    expected = tiny.picture(stock)
    change(fused)
    assert torch.allclose(tiny.picture(fused), expected, atol=1e-5)
    fused.turbo_undo()
    assert torch.equal(tiny.picture(fused), expected)


@pytest.mark.parametrize("take_apart", [lambda pipe: pipe.to(torch.float64), copy.deepcopy], ids=["to", "deepcopy"])
def test_what_was_taken_apart_is_joined_at_the_next_call(fused, take_apart):
    size = _bytes(fused.unet)
    apart = take_apart(fused)
    item = next(apart.unet.parameters()).element_size() // 4
    assert _bytes(apart.unet) > size * item
    tiny.picture(apart, steps=1)
    assert _bytes(apart.unet) == size * item
    apart.turbo_undo()
    assert not hasattr(_layer(apart), "to_qkv")
    assert _bytes(apart.unet) == size * item


def test_gradients_reach_the_separate_weights(fused):
    layer = _layer(fused)
    states = torch.randn(1, 4, layer.to_q.in_features)
    with torch.enable_grad():
        layer(states).square().sum().backward()
    for projection in (layer.to_q, layer.to_k, layer.to_v):
        assert projection.weight.grad.abs().sum() > 0


def test_what_is_joined_in_inference_mode_may_learn_afterwards(fused):
    fused.to(torch.float64)
    with torch.inference_mode():
        tiny.picture(fused, steps=1)
    layer = _layer(fused)
    with torch.enable_grad():
        layer(torch.randn(1, 4, layer.to_q.in_features, dtype=torch.float64)).sum().backward()
    assert layer.to_q.weight.grad is not None


def test_weights_that_offload_took_away_are_waited_for(fused):
    layer = _layer(fused)
    before = layer.to_qkv.weight.clone()
    for projection in (layer.to_q, layer.to_k, layer.to_v):
        projection.weight = torch.nn.Parameter(projection.weight.data.to("meta"))
    join(layer)
    assert torch.equal(layer.to_qkv.weight, before)
