"""Shared fixtures; tests marked `gpu` are skipped without a CUDA device."""

from __future__ import annotations

import pytest
import torch

from tests import tiny


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip GPU tests where there is no GPU."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def pipe():
    """A fresh tiny Stable Diffusion pipeline."""
    return tiny.sd()


@pytest.fixture
def xl_pipe():
    """A fresh tiny Stable Diffusion XL pipeline."""
    return tiny.sdxl()


@pytest.fixture
def pixart_pipe():
    """A fresh tiny PixArt pipeline."""
    return tiny.pixart()
