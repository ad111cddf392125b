"""The UNet through torch.jit.trace, as diffusers' "Memory and speed" guide describes it, in place and checked.

A trace bakes in what Python decided while it was made: the processors, the dtype, the modules, LoRA's and FreeU's
numbers. It is checked at a size and a batch that were not traced. Before every call all that is compared with what
was traced, and where it changed, the UNet is traced anew; an argument that the trace has no input for takes the
UNet's own forward.
"""

from __future__ import annotations

import functools
import inspect
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import NotSupportedError, explain_failure
from ..exported.inputs import ADDED
from ..graphs.watch import NUMBERS
from ..planning.options import TraceUNet
from .components import component, require_plain_weights
from .undo import Journal, journaling
from .unet_inputs import RELATIVE_TOLERANCE, TensorsOnly, example_inputs, relative_distance

logger = logging.getLogger("diffusers_turbo")

TRIED = "trace_unet()"


class TracedForward:
    """Stands in for the UNet's `forward`, with its name and signature."""

    def __init__(self, unet: nn.Module, traced: Any) -> None:
        self.traced = traced
        functools.update_wrapper(self, unet.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the trace, or the UNet itself where an argument was given that the trace has no input for."""
        given = {k: v for k, v in inspect.signature(self).bind(*args, **kwargs).arguments.items() if v is not None}
        return_dict = given.pop("return_dict", True)
        sample, timestep, context = (given.pop(name) for name in ("sample", "timestep", "encoder_hidden_states"))
        added = given.pop("added_cond_kwargs", None) or {}
        if strange := [*given, *(set(added) - set(ADDED))]:
            logger.warning("%s: no input for %s, the UNet runs eagerly", TRIED, ", ".join(strange))
            return self.__wrapped__(*args, **kwargs)  # type: ignore[attr-defined]
        if not torch.is_tensor(timestep):
            timestep = torch.tensor(timestep, device=sample.device)
        output = self.traced(sample, timestep, context, *(added[name] for name in ADDED if name in added))
        if not return_dict:
            return (output,)
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

        return UNet2DConditionOutput(sample=output)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the trace behind: it belongs to the parameters of one UNet."""
        return {**vars(self), "traced": None}


@dataclass
class TraceOn:
    """A UNet whose `forward` is a trace; also the call scope that traces anew when the trace is out of date."""

    pipe: Any
    unet: nn.Module
    options: TraceUNet
    forward: TracedForward
    baked_in: list[Any]

    def revert(self) -> str | None:
        """Take the trace off, unless another `forward` was put in its place."""
        if vars(self.unet).get("forward") is not self.forward:
            return "the UNet's forward was replaced meanwhile"
        del self.unet.forward
        return None

    def after_copy(self) -> None:
        """Trace the copied UNet anew."""
        del self.unet.forward
        self.forward = TracedForward(self.unet, traced_module(self.unet, self.options))
        self.unet.forward = self.forward
        self.baked_in = what_a_trace_bakes_in(self.unet)

    @contextmanager
    def around_call(self, pipe: Any) -> Iterator[None]:
        """Trace anew when what the trace baked in has changed, then run the call."""
        replaced = vars(self.unet).get("forward") is not self.forward
        if not replaced and what_a_trace_bakes_in(self.unet) != self.baked_in:
            logger.warning("%s: the UNet changed since it was traced (a LoRA, FreeU, new weights): traced anew", TRIED)
            self.after_copy()
        yield


def apply(pipe: Any, options: TraceUNet) -> Journal:
    """Exact: replace the UNet's forward by its trace (tensors in, tensor out)."""
    unet = component(pipe, "unet", TRIED)
    require_plain_weights(pipe, TRIED)
    if "forward" in vars(unet):
        found = "a UNet whose forward is hooked already (offload, a cache)"
        raise NotSupportedError(
            explain_failure(TRIED, found, "a plain UNet", "switch the hook off, or do without a trace")
        )
    traced = load_trace(unet, options) if options.load_path else traced_module(unet, options)
    if options.check:
        worst = distance_from_eager(unet, traced, options)
        limit = RELATIVE_TOLERANCE.get(_dtype(unet), 1e-4)
        if not worst <= limit:
            found = f"a trace {worst:.1e} away from the UNet at a size and batch that were not traced"
            raise NotSupportedError(explain_failure(TRIED, found, f"at most {limit:.0e}", "use compile_unet() instead"))
    if options.save_path:
        torch.jit.save(traced, options.save_path)
    with journaling() as journal:
        forward = TracedForward(unet, traced)
        unet.forward = forward
        change = TraceOn(pipe, unet, options, forward, what_a_trace_bakes_in(unet))
        journal.add(change)
        journal.scopes.append(change)
        if options.check:
            journal.note(f"checked at another size and batch: {worst:.1e} from the UNet itself")
    return journal


def what_a_trace_bakes_in(unet: nn.Module) -> list[Any]:
    """Return what a trace of the UNet would fix: which parameters, and the plain numbers of LoRA layers and FreeU."""
    baked: list[Any] = list(map(id, unet.parameters()))
    for module in unet.modules():
        numbers = {name: vars(module)[name] for name in NUMBERS if name in vars(module)}
        if numbers:
            baked.append(repr(numbers))
    return baked


def traced_module(unet: nn.Module, options: TraceUNet) -> Any:
    """Trace the UNet at the size and batch of `options`."""
    was_training = unet.training
    with torch.no_grad(), warnings.catch_warnings():
        # torch announces the end of TorchScript at every use, and each shape check of diffusers is a tracer warning;
        # whether the trace holds at other shapes is measured instead.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        try:
            return torch.jit.trace(  # type: ignore[no-untyped-call]
                TensorsOnly(unet.eval()),
                example_inputs(unet, options.height, options.width, options.batch_size),
                check_trace=False,
            )
        finally:
            unet.train(was_training)


def load_trace(unet: nn.Module, options: TraceUNet) -> Any:
    """Load a saved trace onto the UNet's device. It holds weights of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.load(  # type: ignore[no-untyped-call]
            options.load_path, map_location=next(unet.parameters()).device
        )


def distance_from_eager(unet: nn.Module, traced: Any, options: TraceUNet) -> float:
    """Return |traced - eager| / |eager| on inputs of a size and batch that were not traced.

    Raises:
        NotSupportedError: the trace does not run on them.
    """
    inputs = example_inputs(unet, options.height, options.width, options.batch_size, other=True)
    try:
        return relative_distance(unet, traced, inputs)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        # above the last line stands where in the source
        last = str(error).strip().splitlines()[-1]
        found = f"a trace that does not run at a size and batch that were not traced ({last})"
        raise NotSupportedError(
            explain_failure(TRIED, found, "a trace that holds at others", "use compile_unet() instead")
        ) from error


def _dtype(unet: nn.Module) -> torch.dtype:
    return next(unet.parameters()).dtype
