"""A call that stands over a module's own, compiled or not, in the place where `nn.Module` keeps its compiled call.

Class, `forward`, hooks and state-dict keys of the module stay as they are. Such calls may stand over one another; the
ledger takes the outer ones off while an inner one changes (`ledger.WRAPPED_BY`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

COMPILED = "_compiled_call_impl"
"""Where `nn.Module` keeps a call that stands in for its own."""


def calls_from(call: Any) -> Iterator[Any]:
    """Iterate over a call and those that it stands over."""
    while call is not None:
        yield call
        call = getattr(call, "inner", None)


def release_recorded(module: nn.Module) -> None:
    """Give back the memory of what the calls over a module have recorded, whose weights are about to leave."""
    for call in calls_from(vars(module).get(COMPILED)):
        if (release := getattr(call, "release", None)) is not None:
            release()


def look_again(module: nn.Module) -> None:
    """Have the calls over a module look at it once more, whose hooks have changed in the middle of a call."""
    for call in calls_from(vars(module).get(COMPILED)):
        if (look := getattr(call, "look_again", None)) is not None:
            look()


class OuterCall(Protocol):
    """What stands over a call: it knows what it stands over."""

    inner: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module."""


@dataclass
class CallOver(ABC):
    """The change that puts an outer call over one module's, and takes it off again."""

    module: nn.Module
    call: Any = None

    @abstractmethod
    def make(self, inner: Callable[..., Any]) -> OuterCall:
        """Return the call to stand over `inner`."""

    def install(self) -> None:
        """Put the outer call over the module's call."""
        inner = vars(self.module).get(COMPILED) or self.module._call_impl
        self.call = self.make(inner)
        setattr(self.module, COMPILED, self.call)

    def revert(self) -> str | None:
        """Give the module the call back that it had."""
        if self.call is None:
            return None
        call: OuterCall = self.call
        self.call = None
        if vars(self.module).get(COMPILED) is not call:
            return f"the call of {type(self.module).__name__} was replaced meanwhile"
        if call.inner == self.module._call_impl:
            delattr(self.module, COMPILED)
        else:
            setattr(self.module, COMPILED, call.inner)
        return None

    def tell(self) -> list[str]:
        """Say what the outer call did so far."""
        return [] if self.call is None else [self.call.tell()]

    def __getstate__(self) -> dict[str, Any]:
        """Leave the call behind, as modules do when they are copied or pickled."""
        return {**vars(self), "call": None}

    def after_copy(self) -> None:
        """Put a call over the copied module's."""
        self.install()


@dataclass
class ScopedCallOver(CallOver):
    """One whose call is told when a call of the pipeline begins and ends; also that call scope."""

    @contextmanager
    def around_call(self, pipe: Any) -> Iterator[None]:
        """Tell the call, if there is one: a copy may have none yet."""
        call = self.call
        if call is None:
            yield
            return
        call.enter_call(pipe)
        try:
            yield
        finally:
            call.leave_call()
