"""What Dynamo looked at is described by value: alike in another process, and not whenever a guard would fail."""

from __future__ import annotations

import copy
import enum
import math
import os
import subprocess
import sys
import types
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

from diffusers_turbo.compilation.looked_at import NOTHING, LookedAt, describe, described
from tests import tiny


class Colour(enum.Enum):
    RED = 1


class Thing:
    def __init__(self, **named: Any) -> None:
        vars(self).update(named)

    def method(self) -> None: ...


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, 1.0),
        (1, True),
        ("1", 1),
        (None, 0),
        (Colour.RED, 1),
        ((1, 2), (1, 3)),
        ((1, 2), [1, 2]),
        (torch.float16, torch.float32),
        (torch.zeros(2), torch.zeros(3)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.float16)),
        (torch.zeros(2, 3), torch.zeros(3, 2).T),
        (torch.zeros(2), torch.zeros(2, requires_grad=True)),
        (torch.zeros(2), nn.Parameter(torch.zeros(2), requires_grad=False)),
        (nn.SiLU, nn.ReLU),
        (nn.SiLU(), nn.ReLU()),
        (nn.Linear(1, 1), nn.Linear(1, 1, bias=False)),
        (nn.functional.silu, nn.functional.relu),
        (lambda: 1, Thing.method),
        (len, max),
        (math, sys),
        (Thing(a=1), Thing(b=1)),
        ({"a": 1}, {"b": 1}),
        ({"a": 1}, OrderedDict(a=1)),
        ([Thing()], [Thing(), Thing()]),
    ],
)
def test_what_differs_is_described_differently(one, other):
    assert describe(one) != describe(other)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Thing(a=1, b=object()),
        lambda: nn.Conv2d(1, 2, 3),
        lambda: {"a": object(), "__slotnames__": []},
        lambda: [object()],
        lambda: torch.ones(2),
        lambda: Thing().method,
        lambda: lambda: None,
        lambda: tiny.unet(),
    ],
)
def test_the_same_made_twice_is_described_alike_and_without_an_address(make):
    one, other = make(), make()
    assert describe(one) == describe(other)
    assert "0x" not in describe(one)


def test_a_set_is_described_alike_whatever_the_order_that_its_process_gives_it():
    code = (
        "from diffusers_turbo.compilation.looked_at import describe; print(describe(frozenset(['mps', 'npu', 'xla'])))"
    )
    told = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True
        ).stdout
        for seed in "0123"
    }
    assert told == {b"frozenset [\"'mps'\", \"'npu'\", \"'xla'\"]\n"}
    assert describe({1, 2}) != describe({1, 3})


def test_names_that_come_to_a_class_as_it_is_used_are_no_difference():
    before = describe(vars(Thing))
    copy.copy(Thing())  # adds __slotnames__
    assert describe(vars(Thing)) == before


def test_functions_of_one_name_are_told_by_where_they_stand():
    one = lambda: 1  # noqa: E731
    other = lambda: 1  # noqa: E731
    assert one.__qualname__ == other.__qualname__
    assert describe(one) != describe(other)


def test_two_sources_of_one_object_are_told_from_two_objects():
    shared, single = Thing(), {"a": Thing(), "b": Thing()}
    assert described(["a", "b"], {"a": shared, "b": shared})["b"] == "the same as a"
    assert described(["a", "b"], single)["b"].startswith("tests.compilation.test_looked_at.Thing")


def test_what_is_no_longer_there_is_a_difference():
    scope = {"module": Thing(scale=1)}
    looked_at = LookedAt.now(["module", "module.scale"], [], scope)
    assert looked_at.difference(scope) is None
    del scope["module"].scale
    assert looked_at.difference({"module": Thing(scale=2)}) == "module.scale is int 2, and was int 1"
    assert "and was tests.compilation.test_looked_at.Thing with scale" in looked_at.difference(scope)
    assert described(["module.scale"], scope) == {"module.scale": NOTHING}


def test_another_file_of_a_traced_module_is_a_difference(tmp_path, monkeypatch):
    traced = types.ModuleType("traced")
    traced.__file__ = str(tmp_path / "traced.py")
    (tmp_path / "traced.py").write_text("SCALE = 1")
    monkeypatch.setitem(sys.modules, "traced", traced)
    looked_at = LookedAt.now([], ["traced", "builtins"], {})
    assert looked_at.difference({}) is None
    (tmp_path / "traced.py").write_text("SCALE = 2")
    assert looked_at.difference({}) == "another traced"
    assert looked_at.difference({}, files=False) is None
