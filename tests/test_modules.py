"""The walk over module trees gives what torch's gives."""

from __future__ import annotations

import pytest
from torch import nn

from diffusers_turbo.modules import HOOKS, hooked_in, is_hooked, modules_in
from tests import tiny


def _shared() -> nn.Module:
    once = nn.Sequential(nn.SiLU(), nn.Linear(2, 2))
    tree = nn.Sequential(once, nn.Sequential(nn.ReLU(), once), once[0])
    tree.register_module("none", None)
    return tree


def _of_itself() -> nn.Module:
    tree = nn.Sequential(nn.SiLU(), nn.ReLU())
    tree[0].add_module("parent", tree)
    return tree


@pytest.mark.parametrize("make", [_shared, _of_itself, tiny.unet, tiny.vae, tiny.text_encoder])
def test_modules_and_their_order_are_those_of_torch(make):
    tree = make()
    assert modules_in(tree) == list(tree.modules())
    assert modules_in(*tree.children(), tree) == list(nn.ModuleList([*tree.children(), tree]).modules())[1:]


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_is_found_on_the_module_that_carries_it(hook):
    tree = nn.Sequential(nn.SiLU())
    assert not hooked_in(tree)
    setattr(tree[0], hook, object())
    assert hooked_in(tree)
    assert [is_hooked(module) for module in modules_in(tree)] == [False, True]
