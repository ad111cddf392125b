"""What a watch over a module tree notices between two calls, and what it lets pass."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from diffusers_turbo.graphs import watch as watching
from diffusers_turbo.graphs.watch import Watch, why_not_capturable


@pytest.fixture
def tree():
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))


def _exchange_by_an_equal_one(tree):
    """The new module may get the old one's id, and its tensors the old ones' addresses."""
    del tree[1][0]
    gc.collect()
    tree[1].insert(0, nn.Linear(4, 4))


def _transpose_in_place(tree):
    tree[0].weight.data = tree[0].weight.data.t()


def _set(name, value):
    return lambda tree: setattr(tree[0], name, value)


CHANGES = {
    "a parameter": _set("weight", nn.Parameter(torch.ones(4, 4))),
    "data of the same parameter": lambda tree: setattr(tree[0].weight, "data", torch.ones(4, 4)),
    "strides at the same address": _transpose_in_place,
    "a buffer": lambda tree: setattr(tree[1][1], "running_mean", torch.ones(4)),
    "a dtype": lambda tree: tree.to(torch.float64),
    "a module": _exchange_by_an_equal_one,
    "another module": lambda tree: tree.append(nn.ReLU()),
    "a child of a leaf": lambda tree: tree[0].add_module("more", nn.ReLU()),
    "the order": lambda tree: tree.insert(0, tree.pop(1)),
    "a forward": _set("forward", lambda x: x),
    "a hook": lambda tree: tree[0].register_forward_hook(lambda *_: None),
    "a hook before": lambda tree: tree[0].register_forward_pre_hook(lambda *_: None),
    "training": lambda tree: tree[1].eval(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_noticed_once(tree, change):
    watch = Watch(tree)
    assert not watch.changed()
    change(tree)
    assert watch.changed()
    assert not watch.changed()


def test_values_changed_in_place_and_attributes_that_nobody_reads_are_not_changes(tree):
    watch = Watch(tree)
    with torch.no_grad():
        tree[0].weight.mul_(2)
    tree[0].note = "mine"
    assert not watch.changed()


def test_an_attribute_to_watch_that_comes_later_is_among_the_numbers(tree):
    watch = Watch(tree)
    assert watch.numbers() == ()
    tree[0].s1 = 0.5  # as FreeU has it
    assert not watch.changed()
    before = watch.numbers()
    tree[0].s1 = 0.6
    assert watch.numbers() != before != ()


def test_a_look_calls_no_audit_hooks(tree, monkeypatch):
    """`id` does, once for each module."""
    monkeypatch.setattr(watching, "id", None, raising=False)
    assert not Watch(tree).changed()


def test_of_several_modules_the_one_that_must_not_be_captured_is_named(tree):
    tree.eval()
    assert why_not_capturable(*tree) is None
    tree[1][0].register_forward_hook(lambda *_: None)
    assert why_not_capturable(*tree) == "Sequential.0 carries forward hooks, which a replay would not run"
    assert why_not_capturable(tree[0], tree[0].to("meta")) == "Linear has weights on the meta device"


def test_modules_are_not_kept_alive(tree):
    watch = Watch(tree)
    gone = weakref.ref(tree.pop(1))
    gc.collect()
    assert gone() is None
    assert watch.changed()
