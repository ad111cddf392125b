"""What is computed ahead is a graph of its own where the network is under graphs: replayed, and never out of date."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from diffusers_turbo import turbo
from diffusers_turbo.graphs.watch import Watch
from diffusers_turbo.parity import distance
from tests import tiny
from tests.algebra.changing import between_steps, lora_on

SAME_DB = 110  # products of other sizes may be summed in another order

SWITCHES = {"enable_prompt_projections": ("attn2.to_k", "attn2.to_v"), "enable_time_projections": ("time_emb_proj",)}
"""Method -> the layers that run ahead."""

pytestmark = pytest.mark.usefixtures("captures_on_the_cpu")


def twins(switch: str, make: Any = tiny.sd) -> tuple[Any, Any]:
    """A stock pipeline, and its equal with graphs, one of them of what is computed ahead."""
    stock, ahead = make(), turbo(make())
    getattr(ahead, switch)()
    ahead.enable_cuda_graphs()
    for seed in range(3):
        assert near(stock, ahead, seed=seed)
    return stock, ahead


def near(stock: Any, ahead: Any, **arguments: Any) -> bool:
    arguments = {"steps": 3, "batch": 2, **arguments}
    return distance(tiny.picture(ahead, **arguments), tiny.picture(stock, **arguments)).psnr_db >= SAME_DB


def graphs_ahead(pipe: Any) -> Any:
    return pipe.unet._compiled_call_impl.graphs


def layer(pipe: Any, switch: str) -> Any:
    name = SWITCHES[switch][0]
    return next(module for path, module in pipe.unet.named_modules() if path.endswith(name))


@torch.no_grad()
def in_place(pipe: Any, switch: str) -> None:
    layer(pipe, switch).weight.mul_(3)


def new_data(pipe: Any, switch: str) -> None:
    linear = layer(pipe, switch)
    linear.weight.data = linear.weight.data * 3


def new_parameter(pipe: Any, switch: str) -> None:
    linear = layer(pipe, switch)
    linear.weight = torch.nn.Parameter(linear.weight.detach() * 3)


def lora(pipe: Any, switch: str) -> None:
    lora_on(pipe, *SWITCHES[switch])


CHANGES = {
    "in place": [in_place],
    "data exchanged": [new_data],
    "a parameter exchanged": [new_parameter],
    "a LoRA loaded": [lora],
    "a LoRA's scale": [lora, lambda pipe, switch: pipe.unet.set_adapters("default", 0.3)],
    "a LoRA unloaded": [lora, lambda pipe, switch: pipe.unet.delete_adapters("default")],
}


@pytest.mark.parametrize("make", [tiny.sd, tiny.sdxl])
@pytest.mark.parametrize("switch", SWITCHES)
def test_the_third_call_replays_on_inputs_of_its_own(switch, make):
    stock, ahead = twins(switch, make)
    assert (graphs_ahead(ahead).captured, graphs_ahead(ahead).replayed) == (1, 2)
    assert "computed ahead 3 times (1 captured, 1 kept, 2 replays)" in str(ahead.turbo_report())
    plain = tiny.picture(stock, steps=3, batch=2)
    for pipe in (stock, ahead):
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, timestep_spacing="trailing")
    assert near(stock, ahead, negative_prompt=["a dog"] * 2)
    assert not torch.allclose(tiny.picture(stock, steps=3, batch=2), plain, atol=1e-3)
    assert (graphs_ahead(ahead).captured, graphs_ahead(ahead).replayed) == (1, 3)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("switch", SWITCHES)
def test_a_change_between_two_calls(switch, change):
    stock, ahead = twins(switch)
    for alter in CHANGES[change]:
        before = tiny.picture(stock, steps=3, batch=2)
        for pipe in (stock, ahead):
            alter(pipe, switch)
        for seed in range(3):
            assert near(stock, ahead, seed=seed)
        assert not torch.allclose(tiny.picture(stock, steps=3, batch=2), before, atol=1e-4), "no test"
    assert graphs_ahead(ahead).replayed >= 2


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("switch", SWITCHES)
def test_a_change_between_two_steps(switch, change):
    stock, ahead = twins(switch)
    *first, last = CHANGES[change]
    for alter in first:
        for pipe in (stock, ahead):
            alter(pipe, switch)
        for seed in range(2):
            assert near(stock, ahead, seed=seed)
    plain = tiny.picture(copy.deepcopy(stock), steps=4, batch=2)
    callback = between_steps(lambda pipe, kwargs: last(pipe, switch))
    changed = tiny.picture(copy.deepcopy(stock), steps=4, batch=2, **callback)
    assert not torch.allclose(changed, plain, atol=1e-4), "no test"
    assert near(stock, ahead, steps=4, **callback)
    assert near(stock, ahead)


@pytest.mark.parametrize("switch", SWITCHES)
def test_the_layers_are_looked_for_again_only_after_a_change(switch, monkeypatch):
    stock, ahead = twins(switch)
    found = []
    kind = type(ahead.unet._compiled_call_impl)
    find = kind.find
    monkeypatch.setattr(kind, "find", lambda self: found.append(self) or find(self))
    assert near(stock, ahead)
    assert found == []
    for pipe in (stock, ahead):
        pipe.unet.mid_block = copy.deepcopy(pipe.unet.mid_block)
    for seed in range(3):
        assert near(stock, ahead, seed=seed)
    assert len(found) == 2  # the change, and the forwards laid on what came with it
    layers = set(ahead.unet._compiled_call_impl.layers)
    assert layers.intersection(ahead.unet.mid_block.modules())
    assert layers <= set(ahead.unet.modules())


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_call_that_begins_while_another_takes_a_step_misses_no_change(switch):
    """What two threads may do, in one: between two scopes that a second call enters the first call takes a step."""
    stock, ahead = twins(switch)
    mine = ahead.unet._compiled_call_impl
    other = copy.deepcopy(stock.unet.mid_block)

    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 0:
            ahead.unet.mid_block = other
            mine.enter_call(pipe)
        if step == 1:
            mine.inner.enter_call(pipe)
        return tensors

    assert near(stock, ahead, steps=4, callback_on_step_end=callback)


@pytest.mark.parametrize("switch", SWITCHES)
def test_what_can_t_be_computed_ahead_costs_no_second_look(switch, monkeypatch):
    stock, ahead = twins(switch)
    looks = []
    changed = Watch.changed
    monkeypatch.setattr(Watch, "changed", lambda self: looks.append(self.root) or changed(self))

    def looks_at_the_unet() -> int:
        looks.clear()
        near(stock, ahead)
        return looks.count(ahead.unet)

    usual = looks_at_the_unet()
    mine = ahead.unet._compiled_call_impl
    monkeypatch.setattr(type(mine), "why_not", lambda *_: "a reason")
    mine.forwards.lift()
    near(stock, ahead)
    assert looks_at_the_unet() == usual == 1
    assert "not ahead: a reason" in str(ahead.turbo_report())


@pytest.mark.parametrize("switch", SWITCHES)
def test_without_a_look_at_addresses_a_replay_is_out_of_date(switch, monkeypatch):
    """The tests above can fail: the graph does replay on the weights that it saw."""
    stock, ahead = twins(switch)
    monkeypatch.setattr(Watch, "changed", lambda self: False)
    for pipe in (stock, ahead):
        new_data(pipe, switch)
    assert not near(stock, ahead)


@pytest.mark.parametrize("switch", SWITCHES)
def test_memory_is_given_back_by_either_switch(switch, captures_on_the_cpu):
    stock, ahead = twins(switch)
    networks = captures_on_the_cpu.alive - 1
    getattr(ahead, switch.replace("enable", "disable"))()
    assert captures_on_the_cpu.alive == networks
    getattr(ahead, switch)()
    for seed in range(3):
        assert near(stock, ahead, seed=seed)
    ahead.disable_cuda_graphs()
    assert captures_on_the_cpu.alive == 0
    assert near(stock, ahead)
    assert graphs_ahead(ahead) is None


@pytest.mark.parametrize("switch", SWITCHES)
def test_copies_record_their_own(switch):
    stock, ahead = twins(switch)
    twin = copy.deepcopy(ahead)
    for seed in range(3):
        assert near(stock, twin, seed=seed)
    assert graphs_ahead(twin) is not graphs_ahead(ahead)
    assert graphs_ahead(twin).captured == 1
    with torch.no_grad():
        for pipe in (stock, ahead):
            in_place(pipe, switch)
    assert near(stock, ahead)
