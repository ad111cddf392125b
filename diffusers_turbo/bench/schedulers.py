"""Schedulers by short names, made from the config of the one they replace."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import InvalidOptionError, NotSupportedError, explain_failure
from .reading import what_to_choose

SCHEDULERS: dict[str, str] = {
    "ddim": "DDIMScheduler",
    "pndm": "PNDMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "lcm": "LCMScheduler",
    "heun": "HeunDiscreteScheduler",
    "flow_euler": "FlowMatchEulerDiscreteScheduler",
}
"""Short names, and the diffusers classes behind them."""

# what a name promises beyond its class
_PROMISED: dict[str, dict[str, Any]] = {
    "pndm": {"skip_prk_steps": True},  # PLMS: the Runge-Kutta warm-up would need three evaluations a step
    "dpmpp_2m": {"algorithm_type": "dpmsolver++", "solver_order": 2},
}


def make_scheduler(name: str, config: Mapping[str, Any]) -> Any:
    """Make the scheduler of this short name from another scheduler's config.

    Raises:
        InvalidOptionError: no scheduler has this name.
    """
    import diffusers

    if name not in SCHEDULERS:
        do = what_to_choose(name, SCHEDULERS, "choose one of these names")
        found = f"scheduler = {name!r}"
        raise InvalidOptionError(explain_failure("make_scheduler()", found, f"one of {', '.join(SCHEDULERS)}", do))
    cls: Any = getattr(diffusers, SCHEDULERS[name])
    return cls.from_config(config, **_PROMISED.get(name, {}))


def set_scheduler(pipe: Any, name: str) -> None:
    """Replace a pipeline's scheduler by the one of this short name, with the same training noise schedule.

    Raises:
        InvalidOptionError: no scheduler has this name.
        NotSupportedError: the model predicts a flow and the scheduler is for noise, or the reverse; or there is none.
    """
    tried, before = f"set_scheduler({name!r})", getattr(pipe, "scheduler", None)
    if before is None:
        found = f"{type(pipe).__name__} without a scheduler"
        raise NotSupportedError(explain_failure(tried, found, "a pipeline with one", "load the pipeline with its own"))
    made = make_scheduler(name, before.config)
    if is_flow_matching(made) != is_flow_matching(before):
        kinds = {True: "flow matching", False: "noise prediction"}
        fitting = [key for key, value in SCHEDULERS.items() if _is_flow_class(value) == is_flow_matching(before)]
        raise NotSupportedError(
            explain_failure(
                tried,
                f"a model whose {type(before).__name__} is for {kinds[is_flow_matching(before)]}, and "
                f"{type(made).__name__}, which is for {kinds[is_flow_matching(made)]}",
                "a scheduler of the model's own kind",
                f"choose one of {', '.join(fitting)}",
            )
        )
    pipe.scheduler = made


def is_flow_matching(scheduler: Any) -> bool:
    """Tell whether a scheduler is for models that predict a flow (SD3, Flux) instead of noise or velocity."""
    config = scheduler.config
    is_told = config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"
    return bool(is_told) or _is_flow_class(type(scheduler).__name__)


def _is_flow_class(class_name: str) -> bool:
    return class_name.startswith("FlowMatch")
