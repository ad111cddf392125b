"""Forwards that take their part of what was computed ahead of a network's call.

What was computed ahead comes in place of the input it was computed from, and is told from it by its width. Any other
input is treated as ever, so these forwards may stay where they are whoever calls the network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from ..graphs.watch import Numbers
from ..modules import modules_in
from .undo import ABSENT, owned, put

_VERSION = attrgetter("_version")


@dataclass(eq=False)
class Ahead:
    """The forward of a module whose result was computed ahead: an input of that width is the result.

    `lifted` says that it was taken back, wherever it may still lie under a hook of offload.
    """

    module: nn.Module
    width: int
    lifted: bool = field(default=False, kw_only=True)

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return `x` if it is the result, else the module's result."""
        return x if x.shape[-1] == self.width else type(self.module).forward(self.module, x, *args, **kwargs)


@dataclass(eq=False)
class Stripe(Ahead):
    """The forward of a projection whose result is a stripe of what was computed ahead."""

    start: int
    stop: int

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return `[.., stop - start]` of `[.., width]`, or the projection of an input of any other width."""
        if x.shape[-1] == self.width:
            return x[..., self.start : self.stop]
        return type(self.module).forward(self.module, x, *args, **kwargs)


@dataclass
class Forwards:
    """Forwards laid on modules of a network; an adapter may put modules of its own where these stand."""

    laid: list[Any] = field(default_factory=list)

    def lay(self, forward: Any) -> None:
        """Give `forward.module` this forward."""
        put(forward.module, "forward", forward)
        self.laid.append(forward)

    def are_on(self, modules: Sequence[nn.Module]) -> bool:
        """Whether exactly these modules carry the forwards, in this order."""
        return len(self.laid) == len(modules) and all(
            forward.module is module and vars(module).get("forward") is forward
            for forward, module in zip(self.laid, modules, strict=True)
        )

    def lift(self) -> str | None:
        """Give each module its own forward back; what lies under a hook is told not to be put back with it."""
        left = 0
        for forward in self.laid:
            forward.lifted = True
            if owned(forward.module, "forward") is forward:
                put(forward.module, "forward", ABSENT)
            else:
                left += 1
        self.laid = []
        return f"{left} layers got another forward meanwhile" if left else None


class State:
    """What the results of some modules depend on beside their input: weights, adapters' numbers."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        """Take the modules down."""
        among = modules_in(*modules)
        self._numbers = Numbers(among)
        self._tables = [table for module in among if (table := vars(module)["_parameters"])]

    def now(self) -> tuple[Any, ...]:
        """Return it as it is; a callback may change it between two steps."""
        weights = [weight for table in self._tables for weight in table.values() if weight is not None]
        return (*map(Tensor.data_ptr, weights), *map(_VERSION, weights), *self._numbers.now())


def side_by_side(parts: list[Tensor], width: int) -> Tensor:
    """Concatenate `parts` along their last dimension, filled up with zeros to `width`."""
    missing = width - sum(part.shape[-1] for part in parts)
    return torch.cat([*parts, *([parts[0].new_zeros(*parts[0].shape[:-1], missing)] if missing else [])], dim=-1)
