"""Bytes in, text out: the one place where sizes are parsed and printed."""

from __future__ import annotations

import re

from ..errors import InvalidOptionError, explain_failure

MIB = 2**20
GIB = 2**30

# "6GB" on a card's box means 6 GiB of memory, so both spellings are read as powers of two.
_MULTIPLIERS = {"": 1, "B": 1, "K": 2**10, "M": MIB, "G": GIB, "T": 2**40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(I?B)?\s*", re.IGNORECASE)


def parse_bytes(value: str | int | None, *, name: str) -> int | None:
    """Read a size as bytes: an int is bytes already, "6GB", "6 GiB" and "6g" are 6 * 2**30, None stays None.

    Args:
        value: what the caller gave.
        name: the argument's name, for the error text.

    Raises:
        InvalidOptionError: the text is no size, or the size is not positive.

    >>> parse_bytes("1.5GB", name="vram_budget") == 3 * 2**29
    True
    """
    if value is None:
        return None
    if isinstance(value, str):
        match = _SIZE.fullmatch(value)
        size = int(float(match[1]) * _MULTIPLIERS[match[2].upper()]) if match else 0
    elif isinstance(value, int) and not isinstance(value, bool):
        size = value
    else:
        size = 0
    if size <= 0:
        raise InvalidOptionError(
            explain_failure(
                f"{name}={value!r}",
                "no positive size in it",
                'bytes as an int, or text such as "6GB" or "512MiB"',
                "write the size with a unit, or leave it out to use the free memory",
            )
        )
    return size


def gib(size_bytes: int) -> str:
    """Print bytes for a reader: GiB with two digits from half a GiB on, MiB below.

    >>> gib(3 * 2**30), gib(64 * 2**20)
    ('3.00 GiB', '64 MiB')
    """
    if abs(size_bytes) >= GIB // 2:
        return f"{size_bytes / GIB:.2f} GiB"
    return f"{size_bytes / MIB:.0f} MiB"
