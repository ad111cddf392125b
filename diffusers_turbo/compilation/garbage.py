"""Fewer collections of cyclic garbage while torch traces and compiles.

A compiler makes objects by the million and keeps nearly all of them until it is done, and Python's collector goes
through them again and again: 6.7 of the 112 s of a first compiled picture of SD1.5, 1.6 of 23 when the code is found on
disk (docs/decisions/compile.md).
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

OBJECTS = 100_000
"""Made since the last collection before the next one; Python's own default is 700 to 2000."""

_lock = Lock()
_calls = 0
_before: tuple[int, int, int] = (0, 0, 0)
_ours: tuple[int, int, int] = (0, 0, 0)


@contextmanager
def rarely_collected() -> Iterator[None]:
    """Collect rarely in here; the last call to leave, of whatever thread, puts the thresholds back.

    A collector that is off stays off, and thresholds that somebody set meanwhile stay as they are.
    """
    global _calls, _before, _ours
    with _lock:
        if not _calls:
            _before = gc.get_threshold()
            first, second, third = _before
            _ours = (max(first, OBJECTS) if first else 0, second, third)
            gc.set_threshold(*_ours)
        _calls += 1
    try:
        yield
    finally:
        with _lock:
            _calls -= 1
            if not _calls and gc.get_threshold() == _ours:
                gc.set_threshold(*_before)
