"""The examples in docstrings run as they are."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import diffusers_turbo

MODULES = [
    module.name
    for module in pkgutil.walk_packages(diffusers_turbo.__path__, "diffusers_turbo.")
    if not module.name.endswith("__main__")
]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    results = doctest.testmod(importlib.import_module(name))
    assert results.failed == 0


def test_there_are_examples():
    found = sum(doctest.testmod(importlib.import_module(name)).attempted for name in MODULES if "options" in name)
    assert found > 0
