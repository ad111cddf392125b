"""What Dynamo looked at while it traced a call, by value, so that another process can see whether it is still so.

Dynamo guards what it compiled with the identities of classes, functions and objects, which mean nothing in another
process. Each source that a guard looks at (`module._modules['conv_in'].padding`) is described here by what it is: a
plain value by itself, a tensor by dtype, shape, strides and device, a function or class by its name, anything else by
its class and the names of its attributes. Which sources are one and the same object belongs to it, and so do the files
of the Python modules that were traced. Where all of it is as it was, every guard would hold.
"""

from __future__ import annotations

import builtins
import enum
import hashlib
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import torch
from torch import Tensor, nn

PLAIN = (bool, int, float, complex, str, bytes, type(None), enum.Enum, range, slice)
_TORCHS = (torch.dtype, torch.device, torch.memory_format, torch.layout)
_LISTS, _SETS = (list, tuple), (set, frozenset)

NOTHING = "nothing there"


@dataclass(frozen=True, kw_only=True)
class LookedAt:
    """Descriptions of sources, and of the files that were traced.

    Attributes:
        sources: Python expressions over a call's `module`, `args` and `kwargs` and the globals `G` -> what was there.
        files: name of a Python module -> digest of its file.
    """

    sources: dict[str, str]
    files: dict[str, str]

    @classmethod
    def now(cls, sources: Iterable[str], modules: Iterable[str], scope: Mapping[str, Any]) -> Self:
        """Describe what these sources are in a scope, and the files of these Python modules."""
        return cls(
            sources=described(dict.fromkeys(sources), scope), files={name: _digest(name) for name in sorted({*modules})}
        )

    def difference(self, scope: Mapping[str, Any], *, files: bool = True) -> str | None:
        """Return the first thing that is no longer as it was, None where all is."""
        if files:
            for name, digest in self.files.items():
                if _digest(name) != digest:
                    return f"another {name}"
        for source, found in described(self.sources, scope).items():
            if found != self.sources[source]:
                return f"{source} is {found}, and was {self.sources[source]}"
        return None


def described(sources: Iterable[str], scope: Mapping[str, Any]) -> dict[str, str]:
    """Describe what each source is; of two that are the same object, the later one by the earlier one.

    >>> described(["x", "y", "x[0]"], {"x": (a := [1, "b"]), "y": a})
    {'x': "list [1, 'b']", 'y': 'the same as x', 'x[0]': 'int 1'}
    """
    named = {**_helpers(), **scope}
    found: dict[str, str] = {}
    first: dict[int, str] = {}
    alive = []
    for source in sources:
        try:
            # the sources are in the file beside the code itself, which runs just as well
            value = eval(source, named)
        except Exception:  # an attribute that is not there raises whatever its class likes
            found[source] = NOTHING
            continue
        text = describe(value)
        if not isinstance(value, (*PLAIN, *_TORCHS)):
            alive.append(value)  # else the next one could get its address
            text = f"the same as {before}" if (before := first.setdefault(id(value), source)) != source else text
        found[source] = text
    return found


def describe(value: Any) -> str:
    """Describe a value by what may decide about code: never by an address.

    >>> describe(nn.Conv2d(1, 2, 3, bias=False).weight)
    'torch.nn.parameter.Parameter torch.float32 (2, 1, 3, 3) (9, 9, 3, 1) cpu True'
    """
    if type(value) in _SETS and all(map(_is_plain, value)):
        # whose order is another one in every process
        return f"{type(value).__name__} {sorted(map(repr, value))}"
    if _is_plain(value):
        return f"{type(value).__name__} {value!r}"
    if isinstance(value, type) or hasattr(value, "__qualname__"):
        return _name(value)
    kind = _name(type(value))
    if isinstance(value, Tensor):
        return f"{kind} {value.dtype} {tuple(value.shape)} {value.stride()} {value.device} {value.requires_grad}"
    if isinstance(value, ModuleType):
        return f"module {value.__name__}"
    if isinstance(value, Mapping):
        # names like __slotnames__ come to classes as they are used; what a key holds has a source of its own
        keys = (repr(key) if _is_plain(key) else describe(key) for key in value if not _is_special(key))
        return f"{kind} of {', '.join(keys)}"
    if isinstance(value, (*_LISTS, *_SETS)):
        return f"{kind} of {len(value)}"
    names = sorted(getattr(value, "__dict__", ()))
    if isinstance(value, nn.Module):
        tables = (value._parameters, value._buffers, value._modules)
        names += [f"{name}{'' if part is not None else ' None'}" for table in tables for name, part in table.items()]
    return f"{kind} with {', '.join(names)}"


def _is_plain(value: Any) -> bool:
    if type(value) in _LISTS:
        return all(map(_is_plain, value))
    return isinstance(value, (*PLAIN, *_TORCHS))


def _is_special(key: Any) -> bool:
    return isinstance(key, str) and key.startswith("__") and key.endswith("__")


def _name(value: Any) -> str:
    name = f"{getattr(value, '__module__', None) or builtins.__name__}.{value.__qualname__}"
    code = getattr(value, "__code__", None)  # many functions are called <lambda>
    return name if code is None else f"{name} in line {code.co_firstlineno}"


def _digest(module: str) -> str:
    """Return the digest of a Python module's file; of one without a file, that it has none."""
    file = getattr(sys.modules.get(module), "__file__", None)
    try:
        return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else NOTHING
    except OSError:
        return NOTHING


def _helpers() -> dict[str, Any]:
    """Return the functions that Dynamo's sources call."""
    from torch._dynamo.guards import _get_closure_vars

    return _get_closure_vars()
