"""Outside the interpreter these tests are tests of a GPU, whatever else they say."""

from __future__ import annotations

import pytest

from diffusers_turbo.kernels.base import interpreting


def pytest_itemcollected(item: pytest.Item) -> None:
    if not interpreting():
        item.add_marker(pytest.mark.gpu)
