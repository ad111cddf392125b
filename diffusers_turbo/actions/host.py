"""Calling the pipeline's own version of a method that `TurboMixin` overrides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def host_method(pipe: Any, name: str) -> Callable[..., Any]:
    """Return the method `name` as the pipeline's class defines it, below `TurboMixin`."""
    from ..mixin import TurboMixin

    method: Callable[..., Any] = getattr(super(TurboMixin, pipe), name)
    return method
