"""What torch's compiler did so far in this process, by its own counters."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Self


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Counters of the process, or their difference over a call. Compilations of other threads meanwhile are in them.

    Attributes:
        frames: attempts to compile a function, those that ended in nothing included.
        compiled: attempts that gave compiled code.
        limits: attempts given up because the function was compiled too often (`torch._dynamo.config.recompile_limit`).
        hits, misses: graphs that Inductor found in its cache, and those it had to make.
    """

    frames: int = 0
    compiled: int = 0
    limits: int = 0
    hits: int = 0
    misses: int = 0

    @classmethod
    def now(cls) -> Self:
        """Read the counters."""
        # importing the compiler takes seconds, which a user who never compiles need not wait for
        from torch._dynamo.utils import counters

        frames, inductor, given_up = counters["frames"], counters["inductor"], counters["unimplemented"]
        return cls(
            frames=frames["total"],
            compiled=frames["ok"],
            limits=sum(n for text, n in given_up.items() if "limit exceeded" in text) if given_up else 0,
            hits=inductor["fxgraph_cache_hit"],
            misses=inductor["fxgraph_cache_miss"],
        )

    def since(self, before: Counts) -> Counts:
        """Return what was added; counters that were cleared meanwhile count from zero."""
        pairs = {part.name: (getattr(self, part.name), getattr(before, part.name)) for part in fields(self)}
        return Counts(**{name: now - then if now >= then else now for name, (now, then) in pairs.items()})

    def __add__(self, other: Counts) -> Counts:
        """Return the sum."""
        return Counts(**{part.name: getattr(self, part.name) + getattr(other, part.name) for part in fields(self)})
