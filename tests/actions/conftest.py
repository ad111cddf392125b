"""Switches are thrown on the CPU, where the fused kernels' place is taken by their plain equals."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from tests.fused.on_cpu import plain_kernels


@pytest.fixture(autouse=True)
def kernel_calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often each kernel was called."""
    return plain_kernels(monkeypatch)


@pytest.fixture
def quick_collections() -> Iterator[None]:
    """Let the collections of garbage of a test that asks for many pass over what was imported before."""
    gc.freeze()
    yield
    gc.unfreeze()
