"""A compiled call that counts what it costs, and that gives way to the eager call when the compiler fails."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import nn

from ..errors import in_one_line, with_causes
from .counts import Counts
from .garbage import rarely_collected
from .kept_call import KeptCall
from .sizes import MovingAxes, joining, smallest_step

logger = logging.getLogger("diffusers_turbo")


class WatchedCall:
    """Stands where `nn.Module.compile` puts its compiled call, around it.

    Which errors are the compiler's? A call in which nothing was compiled raises its own. After one in which something
    was, the eager call is the judge: if it fails as well, its error goes on and the compiled call stays; if it gives a
    result, the compiler was to blame, and the module runs eagerly from then on.

    Attributes:
        kept: knows code from disk, for the calls that it fits; set from outside.
        before_compiling: called before a call that torch may compile; set from outside.
    """

    def __init__(
        self, module: nn.Module, compiled: Callable[..., Any], *, axes: MovingAxes | None, must_compile: bool
    ) -> None:
        """Wrap `compiled`, the call that torch made of `module`.

        Args:
            module: whose call it is.
            compiled: `torch.compile(module._call_impl)`, or of `joining` it where the axes make pieces.
            axes: marks the arguments, so that the second size is compiled for all sizes; None leaves them alone.
            must_compile: let every error through.
        """
        self.module = module
        self.eager: Callable[..., Any] = module._call_impl
        self.compiled: Callable[..., Any] | None = compiled
        self.must_compile = must_compile
        self.counts = Counts()
        self.failure: str | None = None
        self.kept: KeptCall | None = None
        self.before_compiling: Callable[[], None] = _nothing
        self._axes = axes

    @classmethod
    def of(cls, module: nn.Module, *, dynamic: bool | None, fullgraph: bool, **arguments: Any) -> Self:
        """Let torch compile a module's call, at its first call, with these arguments of `torch.compile`."""
        axes = MovingAxes(smallest_step(module)) if dynamic is None else None
        call = module._call_impl if axes is None or axes.step == 1 else joining(module._call_impl)
        compiled = torch.compile(call, dynamic=dynamic, fullgraph=fullgraph, **arguments)
        return cls(module, compiled, axes=axes, must_compile=fullgraph)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module: compiled, as long as the compiler does not fail."""
        compiled = self.compiled
        if compiled is None or torch.compiler.is_compiling():
            return self.eager(*args, **kwargs)
        marked_args, marked_kwargs = (args, kwargs) if self._axes is None else self._axes.marked(args, kwargs)
        if self.kept is not None and (code := self.kept.code_for(args, kwargs)) is not None:
            try:
                return code(self.module, *args, **kwargs)
            except Exception as error:
                if _ran_out_of_memory(error):
                    raise
                self.kept.give_up(in_one_line(error, 300))
        self.before_compiling()
        before = Counts.now()
        try:
            with rarely_collected():
                return compiled(*marked_args, **marked_kwargs)
        except Exception as error:
            if self.must_compile or Counts.now().frames == before.frames or _ran_out_of_memory(error):
                raise
            reason = in_one_line(error, 300)
        finally:
            self.counts += Counts.now().since(before)
        result = self.eager(*args, **kwargs)
        self.compiled, self.failure = None, reason
        logger.warning("%s runs eagerly from now on, since compiling it failed: %s", self.name, reason)
        return result

    @property
    def name(self) -> str:
        """Class of the module."""
        return type(self.module).__name__


def _nothing() -> None:
    """Do nothing."""


def _ran_out_of_memory(error: BaseException) -> bool:
    """Whether memory is what was missing, in the error itself or in one that the compiler wrapped into its own."""
    led_to_it = with_causes(error, "inner_exception", "__cause__", "__context__")
    return any(isinstance(found, (MemoryError, torch.OutOfMemoryError)) for found in led_to_it)


def tell_of(calls: list[WatchedCall]) -> list[str]:
    """Say what became of the compiled calls of one component so far."""
    counts = sum((call.counts for call in calls), Counts())
    compiled, modules = _count(counts.compiled, "compilation"), _count(len(calls), "module")
    told = [f"{compiled} in {modules} so far"] if counts.frames else []
    if counts.limits:
        limit = torch._dynamo.config.recompile_limit
        told.append(
            f"compiled too often: beyond {limit} variants (torch._dynamo.config.recompile_limit) calls run eagerly"
        )
    elif counts.frames > counts.compiled and not any(call.failure for call in calls):
        functions = _count(counts.frames - counts.compiled, "function")
        told.append(f"{functions} could not be compiled and run eagerly")
    failed = [call for call in calls if call.failure]
    reasons = "; ".join(sorted({f"{call.name}: {call.failure}" for call in failed}))
    return [*told, f"{len(failed)} of {len(calls)} run eagerly, since compiling failed: {reasons}"] if failed else told


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
