"""A component's call that is made again when device memory ran out in it and room was made."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..errors import OutOfMemoryError, in_one_line
from .calls import COMPILED
from .out_of_memory import let_go, ran_out_of_memory
from .undo import ABSENT, put

if TYPE_CHECKING:
    from .memory_fallback import Running


class GuardedCall:
    """Stands over one component's call, or a VAE's method, while the pipeline runs."""

    def __init__(self, running: Running, component: str, owner: nn.Module, name: str, label: str) -> None:
        """Make the call that stands in `owner.name` for the component; `label` names it in texts."""
        self.running, self.component, self.owner, self.name, self.label = running, component, owner, name, label
        self.before: Any = ABSENT
        self.inner: Callable[..., Any] = owner._call_impl
        self.lifted = True
        self.count = 0

    def lay(self) -> None:
        """Put it in its place."""
        if not self.lifted:
            return
        self.before = vars(self.owner).get(self.name, ABSENT)
        own = self.owner._call_impl if self.name == COMPILED else getattr(self.owner, self.name)
        self.inner = own if self.before in (ABSENT, None) else self.before
        self.__wrapped__ = self.inner
        self.lifted = False
        setattr(self.owner, self.name, self)

    def lift(self) -> None:
        """Give the place back; where another pipeline's stands over it now, let everything through."""
        if self.lifted:
            return
        self.lifted = True
        if vars(self.owner).get(self.name) is self:
            while isinstance(self.before, GuardedCall) and self.before.lifted:
                self.before = self.before.before
            put(self.owner, self.name, self.before)

    def __getstate__(self) -> dict[str, Any]:
        """A copy that is made in the middle of a call lets everything through."""
        return {**vars(self), "running": None, "lifted": True}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the component; when memory runs out, make room and call it again with the same inputs."""
        if self.lifted or torch.compiler.is_compiling():
            return self.inner(*args, **kwargs)
        self.count += 1
        generators = _states((args, kwargs))
        while True:
            seen = len(self.running.record.taken)
            try:
                return self.inner(*args, **kwargs)
            except OutOfMemoryError:
                raise
            except RuntimeError as error:
                if not ran_out_of_memory(error):
                    raise
                told = in_one_line(error, 160)
                let_go(error)
            # out of the block, so that nothing holds the error any more
            self.running.step_down(self, seen, told, args, kwargs)
            for generator, state in generators:
                generator.set_state(state)


def _states(arguments: Any) -> list[tuple[torch.Generator, Tensor]]:
    generators = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, torch.Generator)]
    return [(generator, generator.get_state()) for generator in generators]


def shapes_of(arguments: Any) -> str:
    """Name the shapes of the tensors among a call's arguments."""
    shapes = [str(list(leaf.shape)) for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor) and leaf.ndim > 1]
    return f" on {', '.join(shapes)}" if shapes else ""
