"""Which modules of a pipeline an action is about."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import NotSupportedError, explain_failure
from ..facts.components import read_refusal
from ..facts.pipeline import require_pipeline


def modules_of(pipe: Any) -> dict[str, nn.Module]:
    """Return the pipeline's neural components by name."""
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def denoiser_of(pipe: Any, tried: str) -> tuple[str, nn.Module]:
    """Return name and module of the pipeline's denoiser.

    Raises:
        NotSupportedError: the pipeline has none.
    """
    name = require_pipeline(pipe, tried)
    return name, getattr(pipe, name)


def component(pipe: Any, name: str, tried: str) -> nn.Module:
    """Return the component `name`.

    Raises:
        NotSupportedError: the pipeline has no such component.
    """
    module = getattr(pipe, name, None)
    if isinstance(module, nn.Module):
        return module
    raise NotSupportedError(
        explain_failure(
            tried,
            f"no `{name}` in {type(pipe).__name__} (it has {', '.join(sorted(modules_of(pipe)))})",
            f"a pipeline with a `{name}`",
            "leave this switch off for this pipeline",
        )
    )


def require_plain_weights(pipe: Any, tried: str) -> None:
    """Refuse pipelines whose weights another system holds: quantised, GGUF, or spread by a device map.

    Raises:
        NotSupportedError: with the component and the reason.
    """
    for name, module in modules_of(pipe).items():
        if reason := read_refusal(name, module):
            needed, do = "plain weights on one device", "leave this switch off, or load the component without"
            raise NotSupportedError(explain_failure(tried, reason, needed, do))


def unet_and_controlnets(pipe: Any, tried: str) -> list[nn.Module]:
    """Return the networks that are called at every step: the denoiser, then its ControlNets.

    Raises:
        NotSupportedError: the pipeline has no denoiser.
    """
    controlnet = modules_of(pipe).get("controlnet")
    return [denoiser_of(pipe, tried)[1], *(networks_in(controlnet) if controlnet is not None else ())]


def networks_in(module: nn.Module) -> list[nn.Module]:
    """Return the networks that are called in a component: several ControlNets at once are each called on their own."""
    nets = getattr(module, "nets", None)
    return list(nets) if isinstance(nets, nn.ModuleList) else [module]
