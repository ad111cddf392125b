"""CUDA graphs without a compiler: the host launches a whole network at once instead of kernel by kernel.

Each component's calls are keyed by all that a graph bakes in, captured at the second sight of a key, and dropped when
weights, adapters or processors changed. Results are copies. Nothing derived from a call is kept beyond it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import NotSupportedError, explain_failure
from ..graphs.call import GraphedCall
from ..graphs.capture import CAPTURES
from ..graphs.watch import why_not_capturable
from ..modules import device_of, never_recorded, will_record
from ..planning.options import CUDAGraphs
from .calls import ScopedCallOver
from .components import denoiser_of, modules_of, networks_in, require_plain_weights
from .undo import Journal, journaling


@dataclass
class GraphedModule(ScopedCallOver):
    """One module whose calls are captured; also the call scope that has it looked at once a call of the pipeline."""

    owner: nn.Module | None = None
    max_graphs: int = 8

    def make(self, inner: Callable[..., Any]) -> GraphedCall:
        """Return the module's graphs, over its call, compiled or not."""
        return GraphedCall(self.module, inner, self.max_graphs, self.owner)

    def revert(self) -> str | None:
        """Release the graphs and give the module its own call back."""
        if self.call is not None:
            self.call.clear()
        return super().revert()


def apply(pipe: Any, options: CUDAGraphs) -> Journal:
    """Exact: capture the calls of denoiser, ControlNet, VAE halves and text encoders as CUDA graphs."""
    tried = f"{options.action}()"
    name, denoiser = denoiser_of(pipe, tried)
    require_plain_weights(pipe, tried)
    device = device_of(denoiser)
    if device.type not in CAPTURES:
        found = f"the {name} on {device.type}"
        raise NotSupportedError(explain_failure(tried, found, "a CUDA device", "move the pipeline, or leave this off"))
    if reason := why_not_capturable(denoiser, moves=never_recorded):
        do = "switch that off first, or leave graphs off"
        raise NotSupportedError(explain_failure(tried, reason, "a denoiser that stays where it is", do))
    with journaling() as journal:
        for module, owner in _targets(pipe):
            change = GraphedModule(module, owner=owner, max_graphs=options.max_graphs)
            change.install()
            journal.add(change)
            journal.scopes.append(change)
        journal.note(f"at most {options.max_graphs} graphs a component; the first call of each size runs eagerly")
    return journal


def _targets(pipe: Any) -> list[tuple[nn.Module, nn.Module]]:
    """Return the modules that a pipeline calls as a whole, each with weights on one device, or brought there.

    With each comes the component that it belongs to.

    A VAE is entered through `decode` and `encode`, which call its halves.
    """
    found: list[tuple[nn.Module, nn.Module]] = []
    parts: list[Any]
    for name, component in modules_of(pipe).items():
        if name == "vae":
            parts = [getattr(component, half, None) for half in ("decoder", "encoder")]
        elif name in ("safety_checker", "image_encoder"):
            parts = []
        else:
            parts = networks_in(component)
        found += [(part, component) for part in parts if isinstance(part, nn.Module) and _on_one_device(part)]
    return found


def _on_one_device(module: nn.Module) -> bool:
    if will_record(module):
        return True
    devices = {parameter.device for parameter in module.parameters()}
    return len(devices) == 1 and next(iter(devices)).type in CAPTURES
