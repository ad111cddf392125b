"""CUDA graphs without a compiler: the host launches a whole network at once instead of kernel by kernel.

Each component's calls are keyed by all that a graph bakes in, captured at the second sight of a key, and dropped when
weights, adapters or processors changed. Results are copies. Nothing derived from a call is kept beyond it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import NotSupportedError, explain_failure
from ..graphs.call import GraphedCall
from ..graphs.capture import CAPTURES
from ..graphs.watch import why_not_capturable
from ..planning.options import CUDAGraphs
from .components import denoiser_of, modules_of, require_plain_weights
from .undo import Journal, journaling

COMPILED = "_compiled_call_impl"
"""Where `nn.Module` keeps a call that stands in for its own."""


@dataclass
class GraphedModule:
    """One module whose calls are captured; also the call scope that has it looked at once a call of the pipeline."""

    module: nn.Module
    max_graphs: int
    call: Any = None

    def install(self) -> None:
        """Put the graphs over the module's call, compiled or not."""
        inner = vars(self.module).get(COMPILED) or self.module._call_impl
        self.call = GraphedCall(self.module, inner, self.max_graphs)
        setattr(self.module, COMPILED, self.call)

    def revert(self) -> str | None:
        """Release the graphs and give the module its own call back."""
        call, self.call = self.call, None
        if not isinstance(call, GraphedCall):
            return None
        call.clear()
        replaced = vars(self.module).get(COMPILED) is not call
        if replaced:
            return f"the call of {type(self.module).__name__} was replaced meanwhile"
        if call.inner == self.module._call_impl:
            delattr(self.module, COMPILED)
        else:
            setattr(self.module, COMPILED, call.inner)
        return None

    def tell(self) -> list[str]:
        """Say how often the module was captured and replayed, and why it runs eagerly if it does."""
        return [] if self.call is None else [self.call.tell()]

    def __getstate__(self) -> dict[str, Any]:
        """Leave the graphs behind: they hold addresses of one process."""
        return {**vars(self), "call": None}

    def after_copy(self) -> None:
        """Put graphs over the copied module's call."""
        self.install()

    @contextmanager
    def around_call(self, pipe: Any) -> Iterator[None]:
        """Have the module looked at anew at its first call inside the block."""
        call = self.call
        if call is None:
            yield
            return
        call.enter_call()
        try:
            yield
        finally:
            call.leave_call()


def apply(pipe: Any, options: CUDAGraphs) -> Journal:
    """Exact: capture the calls of denoiser, ControlNet, VAE halves and text encoders as CUDA graphs."""
    tried = f"{options.action}()"
    name, denoiser = denoiser_of(pipe, tried)
    require_plain_weights(pipe, tried)
    device = next(denoiser.parameters()).device
    if device.type not in CAPTURES:
        found = f"the {name} on {device.type}"
        raise NotSupportedError(explain_failure(tried, found, "a CUDA device", "move the pipeline, or leave this off"))
    if reason := why_not_capturable(denoiser):
        do = "switch that off first, or leave graphs off"
        raise NotSupportedError(explain_failure(tried, reason, "a denoiser that stays where it is", do))
    with journaling() as journal:
        for module in _targets(pipe):
            change = GraphedModule(module, options.max_graphs)
            change.install()
            journal.add(change)
            journal.scopes.append(change)
        journal.note(f"at most {options.max_graphs} graphs a component; the first call of each size runs eagerly")
    return journal


def _targets(pipe: Any) -> list[nn.Module]:
    """Return the modules that a pipeline calls as a whole, each with weights on one device.

    A VAE is entered through `decode` and `encode`, which call its halves.
    """
    found: list[nn.Module] = []
    for name, component in modules_of(pipe).items():
        if name == "vae":
            parts = [getattr(component, half, None) for half in ("decoder", "encoder")]
        elif name in ("safety_checker", "image_encoder"):
            parts = []
        elif isinstance(nets := getattr(component, "nets", None), nn.ModuleList):
            parts = list(nets)  # several ControlNets at once, each called on its own
        else:
            parts = [component]
        found += [part for part in parts if isinstance(part, nn.Module) and _on_one_device(part)]
    return found


def _on_one_device(module: nn.Module) -> bool:
    devices = {parameter.device for parameter in module.parameters()}
    return len(devices) == 1 and next(iter(devices)).type in CAPTURES
