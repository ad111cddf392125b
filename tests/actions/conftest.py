"""Switches are thrown on the CPU, where the fused kernels' place is taken by their plain equals."""

from __future__ import annotations

import pytest

from tests.fused.on_cpu import plain_kernels


@pytest.fixture(autouse=True)
def kernel_calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often each kernel was called."""
    return plain_kernels(monkeypatch)
