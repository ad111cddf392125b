"""One call of a module traced and compiled whole, so that another process need do neither.

`torch.compiler.save_cache_artifacts` keeps what Inductor made, and leaves out what takes longest when that is found
again: Dynamo's tracing (docs/decisions/compile.md). Dynamo's own ahead-of-time compilation gives both as one thing that
can be pickled. It holds no weights: its code finds them on the module that it is called with. Its guards are dropped,
and `LookedAt` stands for them.
"""

from __future__ import annotations

import builtins
import hashlib
import pickle
import types
from collections.abc import Callable
from importlib import import_module
from typing import Any, Self

from torch import nn

from ..errors import NotSupportedError
from .looked_at import NOTHING, LookedAt

TRIES = 3
"""Inductor may find out that a number had better be part of the code, and then asks for another trace."""


def run(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call a module; what is traced. The module is an argument, so that the code reads its weights from there."""
    return module._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]


class KeptCode:
    """Compiled code for one signature of a module's calls, and what it depends on.

    Attributes:
        looked_at: what must be as it was.
        imports: what Dynamo calls Python modules among the globals of the code -> their names.
    """

    def __init__(self, looked_at: LookedAt, imports: dict[str, str], data: bytes, code: Any = None) -> None:
        """Hold code as it was pickled; `code` is what it would be loaded as."""
        self.looked_at, self.imports = looked_at, imports
        self._data, self._code = data, code

    @classmethod
    def make(cls, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], mode: str | None) -> Self:
        """Trace and compile a call, all sizes as they are; it holds no weights.

        Raises:
            Exception: it cannot be traced as a whole, not compiled, or not pickled, of whatever type torch likes.
        """
        from torch import _TorchCompileInductorWrapper
        from torch._dynamo.aot_compile import aot_compile_fullgraph
        from torch._dynamo.exc import RestartAnalysis
        from torch._dynamo.hooks import Hooks

        sources: list[str] = []

        def drop(guards: Any) -> list[bool]:
            sources.extend(guard.name for guard in guards if guard.name and guard.has_value)
            return [False] * len(guards)

        inductor = _TorchCompileInductorWrapper(mode, None, False)  # type: ignore[no-untyped-call]
        for left in reversed(range(TRIES)):
            sources.clear()
            try:
                code = aot_compile_fullgraph(
                    _own(run), ((module, *args), kwargs), Hooks(guard_filter_fn=drop), inductor, dynamic=False
                )
                break
            except RestartAnalysis:
                if not left:
                    raise
        code.disable_guard_check()
        imports = dict(code._artifacts.runtime_env.import_sources)
        traced = {source.module for source in code.source_info().inlined_sources}
        looked_at = LookedAt.now(sources, traced, _scope(imports, module, args, kwargs))
        if unseen := [source for source, found in looked_at.sources.items() if found == NOTHING]:
            raise NotSupportedError(f"{unseen[0]} and {len(unseen) - 1} more could not be looked at again")
        return cls(looked_at, imports, type(code).serialize(code).serialized_data, code)

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run the code on a module's weights, for a call of the signature that it was made for."""
        return self._code(module, *args, **kwargs)

    @property
    def name(self) -> str:
        """A digest of what it depends on, which tells codes of one signature apart."""
        return hashlib.sha256(repr(self.looked_at).encode()).hexdigest()

    def to_bytes(self) -> bytes:
        """Return the code and what it depends on, as `from_bytes` takes it; once, before it is ready."""
        return pickle.dumps((self.looked_at, self.imports, self._data))

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read code, and load none of it yet. Its bytes can run anything: they must be trusted.

        Raises:
            Exception: they are something else.
        """
        return cls(*pickle.loads(data))

    def make_ready(self) -> None:
        """Load the code, if it was read, so that it can be called.

        Raises:
            Exception: it is not of this torch on this machine.
        """
        if self._code is None:
            from torch._dynamo.aot_compile import AOTCompiledFunction

            self._code = AOTCompiledFunction.deserialize(self._data)
            self._code.disable_guard_check()
        self._data = b""

    def why_not(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, files: bool = True
    ) -> str | None:
        """Return why this is not the code of a module's call, None where it is; `files` of what was traced, too."""
        return self.looked_at.difference(_scope(self.imports, module, args, kwargs), files=files)


def _own(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function with globals of its own, where Dynamo leaves names, and code of its own, which it counts by."""
    names = {"__name__": __name__, "__builtins__": builtins}
    return types.FunctionType(function.__code__.replace(), names, function.__name__)


def _scope(imports: dict[str, str], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return what sources are evaluated in: the names of a call of `run`, and the globals of its code."""
    names = _Globals({alias: import_module(name) for alias, name in imports.items()})
    return {"module": module, "args": args, "kwargs": kwargs, "G": names}


class _Globals(dict[str, Any]):
    """Python modules by Dynamo's names, and the builtins under the name that it gives them while it traces."""

    def __missing__(self, name: str) -> Any:
        if name.startswith("__builtins_dict__"):
            return vars(builtins)
        raise KeyError(name)
