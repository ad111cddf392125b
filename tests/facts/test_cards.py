from __future__ import annotations

from dataclasses import fields

import pytest

from diffusers_turbo.errors import InvalidOptionError
from diffusers_turbo.facts.cards import CARDS, Card, find_card
from diffusers_turbo.facts.device import DeviceFacts

PROMISED = (
    *("P100", "V100", "T4", "GTX 1650", "RTX 2060", "3060", "3090", "4090", "5090", "A10", "A100"),
    *("L4", "L40S", "H100", "H200", "B200", "CPU", "MPS"),
)


@pytest.mark.parametrize("name", PROMISED)
def test_every_promised_card_is_known(name):
    facts = DeviceFacts.card(name)
    assert facts.assumed
    assert facts.kernels_predicted
    assert 0 < facts.free_bytes <= facts.total_bytes
    assert facts.to_json()


@pytest.mark.parametrize("name", ["RTX 3060", "rtx3060", "NVIDIA GeForce RTX 3060", "rtx-3060", "3060"])
def test_a_card_goes_by_every_name_people_use(name):
    assert find_card(name).name == "GeForce RTX 3060"


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_every_row_has_its_sources(card):
    assert card.source
    assert card.memory_source
    assert card.rates_source
    assert set(card.derived) <= {item.name for item in fields(Card) if item.name.endswith("_flops")}
    if card.device_type == "cuda":
        assert card.source.startswith("https://")
        assert card.rates_source.startswith("https://")
        assert card.bandwidth_bytes_per_s > 1e11
        assert card.fp32_flops > 1e12
        assert card.multiprocessors > 0


@pytest.mark.parametrize("card", [card for card in CARDS if card.sm], ids=lambda card: card.name)
def test_rates_agree_with_the_level(card):
    assert (card.bf16_flops > 0) == (card.sm >= (8, 0))
    assert (card.tf32_flops > 0) == (card.sm >= (8, 0))
    assert (card.fp8_flops > 0) == (card.sm >= (8, 9))
    facts = DeviceFacts.card(card.name)
    assert facts.bf16 == (card.bf16_flops > 0)
    assert facts.tf32 == (card.tf32_flops > 0)
    assert facts.fp8 == (card.fp8_flops > 0)
    assert facts.fp16 == (not card.fp16_gives_nan)
    assert facts.tensor_cores == card.tensor_cores


@pytest.mark.parametrize("card", [card for card in CARDS if card.sm], ids=lambda card: card.name)
def test_rates_are_dense_and_agree_with_each_other(card):
    if card.bf16_flops:
        assert card.bf16_flops == card.fp16_flops
        assert card.tf32_flops == pytest.approx(card.fp16_flops / 2, rel=0.03)
    if card.fp8_flops:
        assert card.fp8_flops == pytest.approx(card.fp16_flops * 2, rel=0.03)
    if not card.tensor_cores:
        assert card.fp16_flops == pytest.approx(card.fp32_flops * 2, rel=0.01)
    elif card.name.startswith("GeForce"):
        per_fp32 = 4 if card.sm < (8, 0) else 2
        assert card.fp16_flops == pytest.approx(card.fp32_flops * per_fp32, rel=0.01)


@pytest.mark.parametrize(
    ("name", "printed_gib"),
    [("T4", 16), ("GTX 1650", 4), ("A10", 24), ("A100", 40), ("L4", 24), ("L40S", 48), ("H100", 80), ("B200", 180)],
)
def test_the_driver_keeps_some_of_the_printed_memory(name, printed_gib):
    assert 0.9 * printed_gib < find_card(name).total_bytes / 2**30 < printed_gib


def test_an_unknown_card_is_refused_with_close_matches():
    with pytest.raises(InvalidOptionError, match=r"no card of this name.*try.*RTX 3060"):
        DeviceFacts.card("RTX 3061")
    with pytest.raises(InvalidOptionError, match="choose a card of the same SM level"):
        DeviceFacts.card("zzzzzzzz")


def test_old_cards_say_that_new_torch_builds_leave_them_out():
    assert any("CUDA 12.8" in note for note in DeviceFacts.card("V100").notes)
    assert any("CUDA 12.8" in note for note in DeviceFacts.card("P100").notes)
    assert not any("CUDA 12.8" in note for note in DeviceFacts.card("T4").notes)
