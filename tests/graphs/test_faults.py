"""The capture of the tests is strict enough: without a key or a watch, the picture is wrong here as well."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from diffusers_turbo.graphs import call
from diffusers_turbo.graphs.watch import Watch
from tests import tiny
from tests.graphs.changing import CHANGES, twin_pipes


def still_equal(change: str) -> bool:
    """Whether graphs give the eager picture after a change."""
    eager, graphed = twin_pipes()
    equal = True
    for alter in CHANGES[change]:
        alter(eager)
        alter(graphed)
        equal = torch.equal(tiny.picture(graphed, steps=3), tiny.picture(eager, steps=3))
    return equal


@pytest.mark.parametrize("change", ["FreeU", "FreeU's numbers", "processors", "a processor's scale", "a LoRA's scale"])
def test_without_the_numbers_a_replay_is_out_of_date(change, monkeypatch):
    monkeypatch.setattr(Watch, "numbers", lambda self: ())
    if change == "a LoRA's scale":
        # loading it exchanges modules, which the other watch sees
        assert not still_equal(change)
        return
    monkeypatch.setattr(Watch, "changed", lambda self: False)
    assert not still_equal(change)


@pytest.mark.parametrize("change", ["weights exchanged", "a LoRA loaded"])
def test_without_the_addresses_a_replay_is_out_of_date(change, monkeypatch):
    monkeypatch.setattr(Watch, "changed", lambda self: False)
    monkeypatch.setattr(Watch, "numbers", lambda self: ())
    assert not still_equal(change)


def test_without_the_values_of_numbers_a_replay_is_wrong(monkeypatch):
    """A signature that took 7 for 9 would replay the step of 7."""
    sound = call.signature_of

    def careless(leaves: list[Any], *rest: Any) -> Any:
        return sound([0 if isinstance(leaf, int) else leaf for leaf in leaves], *rest)

    eager, graphed = twin_pipes()
    sample, context = torch.randn(2, 4, 8, 8), torch.randn(2, 5, tiny.CONTEXT)
    with torch.no_grad():
        monkeypatch.setattr(call, "signature_of", careless)
        for _ in range(2):
            graphed.unet(sample, 7, context)
        assert not torch.equal(graphed.unet(sample, 9, context).sample, eager.unet(sample, 9, context).sample)
