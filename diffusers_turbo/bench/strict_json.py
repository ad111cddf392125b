"""JSON that every reader takes: no NaN and no Infinity literals, which strict parsers refuse.

A float without a JSON number, such as the infinite dB between equal pictures, is written as {"$float": "inf"}.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from numbers import Integral, Real
from typing import Any

_TAG = "$float"


def to_plain(value: Any) -> Any:
    """Return dicts, lists, text, numbers, True, False and None; anything else becomes its `str()`.

    >>> to_plain({"psnr_db": float("inf"), "sizes": (1, 2)})
    {'psnr_db': {'$float': 'inf'}, 'sizes': [1, 2]}
    """
    if value is None or isinstance(value, (bool, str)):
        return value if value is None or isinstance(value, bool) else str(value)
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        number = float(value)
        return number if math.isfinite(number) else {_TAG: str(number)}
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    return str(value)


def dumps(value: Any) -> str:
    """Return `value` as strict JSON text."""
    return json.dumps(to_plain(value), indent=1, allow_nan=False)


def loads(text: str) -> Any:
    """Read what `dumps` wrote.

    Raises:
        ValueError: no JSON, or JSON that is not strict.
    """
    return json.loads(text, object_hook=_revive, parse_constant=_refuse)


def _revive(data: dict[str, Any]) -> Any:
    return float(data[_TAG]) if data.keys() == {_TAG} else data


def _refuse(literal: str) -> Any:
    raise ValueError(f"{literal} is no JSON number")
