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
from torch import Tensor, nn

from ..errors import NotSupportedError, explain_failure
from ..graphs.watch import NUMBERS
from ..planning.options import TraceUNet
from .components import component, require_plain_weights
from .undo import Journal, journaling

logger = logging.getLogger("diffusers_turbo")

TRIED = "trace_unet()"

RELATIVE_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Largest |traced - eager| / |eager|. Tracing runs the same kernels; what is left is the fuser's reordering of
pointwise operations, a few units in the last place of each dtype over the depth of a UNet."""


class _TensorsOnly(nn.Module):
    """The UNet with tensors in and a tensor out, which is all that torch.jit.trace can see."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, *added: Tensor) -> Tensor:
        """Run the UNet; `added` are SDXL's pooled text embeddings and time ids."""
        kwargs = {"added_cond_kwargs": dict(zip(ADDED, added, strict=True))} if added else {}
        output: Tensor = self.unet(sample, timestep, encoder_hidden_states, return_dict=False, **kwargs)[0]
        return output


ADDED = ("text_embeds", "time_ids")


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


def example_inputs(unet: Any, options: TraceUNet, *, other: bool = False) -> tuple[Tensor, ...]:
    """Make inputs of the traced size and batch; with `other`, of a larger size and one row more.

    Returns sample `[2B, C, H/8, W/8]` (guidance doubles the batch), timestep `[]`, context `[2B, 77, D]`, and for SDXL
    pooled text embeddings `[2B, P]` and time ids `[2B, 6]`.
    """
    config, parameter = unet.config, next(unet.parameters())
    side = config.sample_size if isinstance(config.sample_size, int) else config.sample_size[0]
    height, width = (options.height or side * 8) // 8, (options.width or side * 8) // 8
    rows = 2 * options.batch_size
    if other:
        # Whole multiples of the coarsest level, so that no resolution is rounded on the way down.
        coarsest = 2 ** (len(config.block_out_channels) - 1)
        height, width, rows = height + coarsest, width + 2 * coarsest, rows + 1
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(parameter.device, parameter.dtype)

    context = config.cross_attention_dim
    width_of_context = context if isinstance(context, int) else context[0]
    inputs = [
        draw(rows, config.in_channels, height, width),
        torch.tensor(500, device=parameter.device),
        draw(rows, 77, width_of_context),
    ]
    if getattr(config, "addition_embed_type", None) == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs += [draw(rows, pooled), draw(rows, 6)]
    return tuple(inputs)


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
                _TensorsOnly(unet.eval()), example_inputs(unet, options), check_trace=False
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
    """Return |traced - eager| / |eager| on inputs of a size and batch that were not traced."""
    inputs = example_inputs(unet, options, other=True)
    with torch.no_grad():
        eager, ours = _TensorsOnly(unet)(*inputs).float(), traced(*inputs).float()
    return float((ours - eager).norm() / eager.norm())


def _dtype(unet: nn.Module) -> torch.dtype:
    return next(unet.parameters()).dtype
