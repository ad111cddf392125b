"""How a pipeline with levers on is copied and pickled: every copy gets levers of its own, or a clear refusal."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any, Self

import torch
from torch import nn

from .actions.components import modules_of
from .actions.ledger import HOOKED_SLOTS, Ledger, close_ledger, ledger_of
from .errors import NotSupportedError, explain_failure


class CopiesItsLevers:
    """Part of TurboMixin: `copy`, `copy.deepcopy` and `pickle` of a pipeline that has a ledger."""

    def __copy__(self) -> Self:
        """Return a shallow copy: the same components, and so the same ledger."""
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return a copy with components and a ledger of its own.

        Hooks hold closures over the original's modules, which a copy would go on calling, so offload and traces are
        taken off while the copy is made and put back on both.
        """
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        ledger = ledger_of(self)
        with ledger.unhooked(self) if ledger is not None else nullcontext():
            twin.__setstate__(copy.deepcopy(self.__dict__, memo))
        return twin

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickle stores.

        Raises:
            NotSupportedError: offload or a trace is on, which no pickle can hold.
        """
        ledger = ledger_of(self) or Ledger()
        for slot in HOOKED_SLOTS:
            if (lever := ledger.top(slot)) is not None and lever.journal is not None:
                found, needed = f"{lever.action}() in force, whose hooks no pickle can hold", "plain modules"
                do = "switch it off, pickle, and switch it on again; copy.deepcopy does so by itself"
                raise NotSupportedError(explain_failure(f"pickling a {type(self).__name__}", found, needed, do))
        return self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a copied or unpickled state; what modules do not carry along is switched on anew."""
        self.__dict__.update(state)
        ledger = ledger_of(self)
        if ledger is not None:
            ledger.after_copy(self)


def untouched_copy(pipe: Any) -> Any:
    """Return a copy of a pipeline with every lever off and its weights in host memory; the pipeline stays as it is.

    Raises:
        NotSupportedError: hooks that this package did not set hold the weights; a copy would go on calling the
            original's modules.
    """
    ledger = ledger_of(pipe)
    with ledger.unhooked(pipe) if ledger is not None else nullcontext():
        if hooked := sorted(name for name, module in modules_of(pipe).items() if _is_hooked(module)):
            found = f"offload hooks on {', '.join(hooked)} that diffusers or accelerate set"
            do = "use this package's offload methods, which can be undone, or pass a reference pipeline of your own"
            raise NotSupportedError(explain_failure("copying the pipeline", found, "components without hooks", do))
        twin = object.__new__(type(pipe))
        memo: dict[int, Any] = {id(pipe): twin} | _host_tensors(pipe)
        twin.__dict__.update(copy.deepcopy(pipe.__dict__, memo))
    own = ledger_of(twin)
    if own is not None:
        own.undo(twin)
        close_ledger(twin, forget=True)
    return twin


def _is_hooked(module: nn.Module) -> bool:
    return any(hasattr(part, name) for part in module.modules() for name in ("_hf_hook", "_diffusers_hook"))


def _host_tensors(pipe: Any) -> dict[int, torch.Tensor]:
    """Return copies in host memory of all weights, by the originals' ids, as `deepcopy` looks them up."""
    found: dict[int, torch.Tensor] = {}
    for module in modules_of(pipe).values():
        for tensor in [*module.parameters(), *module.buffers()]:
            data = tensor.detach().to("cpu", copy=True)
            found[id(tensor)] = (
                nn.Parameter(data, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else data
            )
    return found
