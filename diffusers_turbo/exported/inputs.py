"""The inputs of an exported UNet: in which bounds their sizes may be, and how a call's arguments become tensors.

Compiled code checks none of this: it indexes as it was told when it was made. So each call is looked at here first.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ADDED = ("text_embeds", "time_ids")
"""SDXL's `added_cond_kwargs`, in the order in which they follow the other inputs."""

MOST_ROWS = 63
"""From 64 rows on diffusers' Upsample2D makes its input contiguous, which is other code."""

MOST_ELEMENTS = 2**31 - 1
"""Inductor's GPU kernels index with 32 bits where the example's sizes allow it, and packaged code does not check."""


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """The sizes of inputs; each a pair (lowest, highest).

    Attributes:
        rows: pictures in the batch, guidance included.
        height, width: of the latent.
        multiple: what a dynamic height and width must be a multiple of.
        tokens: length of the prompt's embedding.
        widest: elements of the largest activation for each row and position of the latent.
        context: width of the prompt's embedding.
        added: width of each further input.
        channels: of the latent.
    """

    rows: list[int]
    height: list[int]
    width: list[int]
    multiple: int
    tokens: list[int]
    widest: int
    channels: int
    context: int
    added: list[int]

    def reasons_against(self, sample: Tensor, context: Tensor, added: list[Tensor]) -> list[str]:
        """Return which input's size was not exported; an empty list means that all were."""
        rows, _, height, width = sample.shape
        wanted = {
            "rows": (rows, self.rows),
            "latent height": (height, self.height),
            "latent width": (width, self.width),
            "tokens": (context.shape[1], self.tokens),
        }
        reasons = [
            f"{size} {name}, exported for {low}" + (f" to {high}" if high > low else "")
            for name, (size, (low, high)) in wanted.items()
            if not low <= size <= high
        ]
        if height % self.multiple or width % self.multiple:
            reasons.append(f"a latent of {height} x {width}, exported for multiples of {self.multiple}")
        if rows * height * width * self.widest > MOST_ELEMENTS:
            reasons.append(f"activations of more than {MOST_ELEMENTS} elements at {rows} x {height} x {width}")
        shapes = [list(tensor.shape) for tensor in (sample, context, *added)]
        needed = [
            [rows, self.channels, height, width],
            [rows, context.shape[1], self.context],
            *([rows, size] for size in self.added),
        ]
        if shapes != needed:
            reasons.append(f"inputs of shapes {shapes}, exported for {needed}")
        return reasons


@dataclass(frozen=True)
class Taken:
    """A call's arguments as the compiled code takes them, or why it does not."""

    tensors: tuple[Tensor, ...] = ()
    return_dict: bool = True
    reason: str | None = None


def take_arguments(
    signature: inspect.Signature, bounds: Bounds, like: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Taken:
    """Turn the arguments of a UNet's call into the exported inputs.

    Args:
        signature: of the UNet's `forward`.
        bounds: what sizes were exported.
        like: a weight; inputs must have its dtype and device.
        args, kwargs: of the call.
    """
    given = {name: value for name, value in signature.bind(*args, **kwargs).arguments.items() if value is not None}
    return_dict = bool(given.pop("return_dict", True))
    sample, timestep, context = (given.pop(name, None) for name in ("sample", "timestep", "encoder_hidden_states"))
    conditions = given.pop("added_cond_kwargs", None) or {}
    names = ADDED[: len(bounds.added)]
    if strange := sorted([*given, *(conditions.keys() - set(names))]):
        return Taken(reason=f"{', '.join(strange)} was given, which was not exported")
    added = [conditions.get(name) for name in names]
    floating = [tensor for tensor in (sample, context, *added) if isinstance(tensor, Tensor)]
    if len(floating) < 2 + len(added):
        return Taken(reason="an input that was exported is missing or no tensor")
    if other := [t for t in floating if t.dtype != like.dtype or t.device != like.device]:
        dtype, device = str(other[0].dtype).removeprefix("torch."), other[0].device
        return Taken(reason=f"an input in {dtype} on {device}, the UNet's are {like.dtype} on {like.device}")
    if torch.is_autocast_enabled(like.device.type):
        return Taken(reason="autocast is on, which compiled code does not see")
    if sample.dim() != 4 or context.dim() != 3:
        return Taken(reason=f"a sample of {sample.dim()} and a context of {context.dim()} dimensions")
    if reasons := bounds.reasons_against(sample, context, floating[2:]):
        return Taken(reason="; ".join(reasons))
    # the UNet itself casts timesteps to float32 first, whatever they come in, and repeats them for each row
    steps = torch.as_tensor(timestep, device=like.device).to(torch.float32).reshape(-1)
    if len(steps) not in (1, len(sample)):
        return Taken(reason=f"{len(steps)} timesteps for {len(sample)} rows")
    steps = steps.expand(len(sample))
    return Taken(tuple(tensor.contiguous() for tensor in (sample, steps, context, *added)), return_dict)
