"""A UNet's call as exported code: bound to the UNet's own weights, and given up for a call that it was not made for."""

from __future__ import annotations

import inspect
import logging
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..graphs.watch import Watch, why_not_capturable
from .card import differences, likeness_of, tensors_of
from .inputs import Taken, take_arguments
from .package import Package, Runner

logger = logging.getLogger("diffusers_turbo")


class ExportedCall:
    """Stands where `nn.Module` keeps its compiled call.

    Once a call of the pipeline the whole UNet is looked at, at every call of the UNet the numbers that a callback may
    have changed. Weights that were exchanged are bound anew; what the code was not made for runs the UNet itself.
    """

    def __init__(self, module: nn.Module, package: Package, runner: Runner) -> None:
        """Make the call of a module; weights are bound at its first call.

        Args:
            module: whose call it is.
            package: what the code was made for.
            runner: the loaded code.
        """
        self.module, self.package, self.runner = module, package, runner
        self.inner: Callable[..., Any] = module._call_impl
        self.ran = 0
        self.bound = 0
        self.eager: Counter[str] = Counter()
        self.reason: str | None = None
        self._signature = inspect.signature(module.forward)
        self._watch: Watch | None = None
        self._numbers: tuple[Any, ...] = ()
        self._alive: list[Tensor] = []
        self._calls_inside = 0
        self._lock = threading.RLock()

    def enter_call(self, pipe: Any = None) -> None:
        """A call of the pipeline begins: the next call of the UNet looks at all of it again."""
        with self._lock:
            self._calls_inside += 1
            self._alive = []

    def leave_call(self) -> None:
        """A call of the pipeline ends: the UNet may free its weights again."""
        with self._lock:
            self._calls_inside -= 1
            self._alive = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the exported code, or the UNet itself for a call that it was not made for."""
        if torch.compiler.is_compiling():
            return self.inner(*args, **kwargs)
        with self._lock:
            try:
                taken = self._take(args, kwargs)
                if taken.reason is None:
                    self.ran += 1
                    return _as_asked(self.runner.run(taken.tensors), taken.return_dict)
            finally:
                if not self._calls_inside:
                    self._alive = []
        self._say(taken.reason)
        return self.inner(*args, **kwargs)

    def _take(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Taken:
        if torch.is_grad_enabled():
            return Taken(reason="gradients are recorded, which compiled code has none of")
        self._refresh()
        if self.reason is not None:
            return Taken(reason=self.reason)
        weight = next(self.module.parameters())
        return take_arguments(self._signature, self.package.card.bounds, weight, args, kwargs)

    def _refresh(self) -> None:
        """Bind the weights anew, or find out why they do not fit, if the UNet is not what it was."""
        changed = self._watch is None
        if self._watch is None:
            self._watch = Watch(self.module)
        elif not self._alive:
            changed = self._watch.changed()
        numbers = self._watch.numbers()
        if changed or numbers != self._numbers:
            self._numbers = numbers
            self.reason = self._why_not()
            if self.reason is None:
                self.runner.bind(tensors_of(self.module))
                self.bound += 1
        if not self._alive:
            # the code only borrows the weights; were one exchanged in the middle of a call, it would read freed memory
            self._alive = [tensor.detach() for tensor in tensors_of(self.module).values()]

    def _why_not(self) -> str | None:
        if reason := why_not_capturable(self.module):
            return reason
        if "forward" in vars(self.module):
            return "the UNet's forward was replaced (a trace, a hook)"
        devices = {tensor.device.type for tensor in tensors_of(self.module).values()}
        if devices != {self.package.card.machine["device"]}:
            return f"the UNet is on {', '.join(sorted(devices))}, exported on {self.package.card.machine['device']}"
        return "; ".join(differences(self.package.card.unet, likeness_of(self.module))) or None

    def _say(self, reason: str) -> None:
        if reason not in self.eager:
            logger.warning("load_exported_unet(): the UNet runs eagerly: %s", reason)
        self.eager[reason] += 1

    def tell(self) -> str:
        """Say what happened so far."""
        eager = "".join(f"; {count} eagerly: {reason}" for reason, count in self.eager.items())
        times = f"{self.bound} time{'s' * (self.bound != 1)}"
        return f"{self.ran} calls as exported, weights bound {times}{eager}"


def _as_asked(output: Tensor, return_dict: bool) -> Any:
    if not return_dict:
        return (output,)
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

    return UNet2DConditionOutput(sample=output)
