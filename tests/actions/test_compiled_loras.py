"""Adapters that come, change and go under a compiled UNet give the eager picture; a prepared swap compiles nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from diffusers_turbo import TurboError
from diffusers_turbo.parity import distance
from tests import dynamo, tiny
from tests.compilation import micro


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    dynamo.reset()
    yield
    dynamo.reset()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def load(pipe: Any, seed: int, rank: int, **arguments: Any) -> None:
    pipe.load_lora_weights(micro.lora(seed, rank), adapter_name="it", **arguments)


class Pair:
    """An eager and a compiled pipeline, and every picture that they were seen to agree on."""

    def __init__(self) -> None:
        self.eager, self.compiled = micro.sd(), micro.sd()
        self.seen: list[torch.Tensor] = []

    def agree(self, *, new: bool = True, **arguments: Any) -> None:
        """Make a picture with both; `new` says that no picture before was this one."""
        expected = tiny.picture(self.eager, **arguments)
        assert distance(tiny.picture(self.compiled, **arguments), expected).psnr_db >= 90
        assert new != any(torch.equal(expected, before) for before in self.seen)
        self.seen.append(expected)

    def both(self, act: Any) -> None:
        for pipe in (self.eager, self.compiled):
            act(pipe)

    def swap(self, seed: int, rank: int) -> None:
        self.eager.unload_lora_weights()
        load(self.eager, seed, rank)
        load(self.compiled, seed, rank, hotswap=True)


@pytest.mark.slow
def test_a_loras_life_under_a_compiled_unet():
    pair = Pair()
    pair.compiled.compile_unet(backend="eager")  # what is compiled anew is for Dynamo to say, whatever comes after it
    pair.agree()
    pair.both(lambda pipe: load(pipe, 1, 4))
    pair.agree()
    pair.agree(cross_attention_kwargs={"scale": 0.5})
    pair.agree(new=False)
    pair.both(lambda pipe: pipe.set_adapters("it", 0.3))
    pair.agree()
    pair.both(lambda pipe: pipe.unload_lora_weights())
    pair.agree(new=False)
    pair.both(lambda pipe: load(pipe, 2, 2))
    pair.agree()


def test_a_prepared_swap_compiles_nothing_whatever_the_rank():
    """The order: hotswap prepared, the first LoRA loaded, then compiled, then swapped."""
    pair = Pair()
    pair.compiled.enable_lora_hotswap(target_rank=4)
    pair.both(lambda pipe: load(pipe, 1, 3))
    pair.compiled.compile_unet(backend="eager")
    pair.agree()
    assert graphs() == 1
    for seed, rank in ((2, 2), (3, 4)):
        pair.swap(seed, rank)
        pair.agree()
    assert graphs() == 1


def test_compiling_between_preparation_and_the_first_lora_is_refused():
    pipe = micro.sd()
    pipe.enable_lora_hotswap(target_rank=4)
    with pytest.raises(TurboError, match=r"hotswap prepared and no LoRA loaded yet.*load_lora_weights\(\) first"):
        pipe.compile_unet(backend="eager")
    assert pipe.unet._compiled_call_impl is None
    load(pipe, 1, 4)
    pipe.compile_unet(backend="eager")


@pytest.mark.filterwarnings(
    "ignore:Already found a `peft_config`:UserWarning"
)  # the host's failure leaves an empty one
def test_prepared_after_compiling_is_the_hosts_error_and_uncompile_mends_it():
    pair = Pair()
    pair.compiled.compile_unet(backend="eager")
    pair.compiled.enable_lora_hotswap(target_rank=4)
    with pytest.raises(ValueError, match=r"before\*? compiling the model"):
        load(pair.compiled, 1, 4)
    pair.compiled.uncompile()
    pair.both(lambda pipe: load(pipe, 1, 4))
    pair.compiled.compile_unet(backend="eager")
    pair.agree()
    pair.swap(2, 2)
    pair.agree()
    assert graphs() == 1


@pytest.mark.slow
def test_a_swap_without_preparation_is_right_and_costs_a_compilation():
    pair = Pair()
    pair.both(lambda pipe: load(pipe, 1, 2))
    pair.compiled.compile_unet(backend="eager")
    pair.agree()
    pair.swap(2, 4)
    pair.agree()
    assert graphs() == 2


@pytest.mark.slow
def test_a_swapped_lora_under_inductor():
    """The real compiler, on the UNet's one transformer block."""
    pair = Pair()
    pair.both(lambda pipe: load(pipe, 1, 4))
    pair.compiled.compile_unet(regional=True)
    pair.agree()
    pair.swap(2, 2)
    pair.agree()
