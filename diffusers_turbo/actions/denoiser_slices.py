"""The denoiser's batch in slices: a step needs the memory of a few samples, however many there are.

Samples of a batch do not see one another in it, and with guidance a single picture is two of them. Each slice is a call
of its own, of graphs and compiled code as well: slices of one size share a recording.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from ..errors import NotSupportedError, explain_failure
from ..graphs.signature import MODE
from ..planning.options import SLICED_DENOISERS, DenoiserSlicing
from .calls import CallOver
from .components import denoiser_of, unet_and_controlnets
from .undo import Journal, journaling

NETWORKS = (*SLICED_DENOISERS, "ControlNetModel")

FIRST = ("sample", "hidden_states")
"""What is denoised, `[B, ..]`, by its names in different networks."""

BATCHED = (
    *FIRST,
    "timestep",
    "timestep_cond",
    "guidance",
    "class_labels",
    "encoder_hidden_states",
    "pooled_projections",
    "added_cond_kwargs",
    "attention_mask",
    "encoder_attention_mask",
    "controlnet_cond",
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
    "block_controlnet_hidden_states",
    "controlnet_block_samples",
    "controlnet_single_block_samples",
)
"""Arguments whose tensors have a row for each sample, or one for all."""

SHARED = ("img_ids", "txt_ids")
"""Arguments whose tensors belong to all samples."""


class SlicedCall:
    """Stands over a network's call and makes one call of each slice of the batch."""

    def __init__(self, module: nn.Module, inner: Callable[..., Any], slice_size: int) -> None:
        """Stand over `inner`, the call of `module`."""
        self.module, self.inner, self.slice_size = module, inner, slice_size
        self.calls = self.sliced = 0
        self.whole: str = ""
        self._parameters = list(inspect.signature(type(module).forward).parameters)[1:]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network on the whole batch or on its slices; the result is that of the batch."""
        self.calls += 1
        given = {**dict(zip(self._parameters, args, strict=False)), **kwargs}
        batch = next((len(given[name]) for name in FIRST if isinstance(given.get(name), Tensor)), 0)
        if batch <= self.slice_size:
            return self.inner(*args, **kwargs)
        self.whole = _why_whole(given, batch)
        if self.whole:
            return self.inner(*args, **kwargs)
        self.sliced += 1
        parts = []
        with _in_no_mode(self.module):
            for start in range(0, batch, self.slice_size):
                parts.append(self.inner(**_cut(given, batch, slice(start, start + self.slice_size))))
        return _joined(parts)

    def tell(self) -> str:
        """Say what happened so far."""
        told = f"{type(self.module).__name__}: {self.sliced} of {self.calls} calls in slices of {self.slice_size}"
        return f"{told}; the last one whole: {self.whole}" if self.whole else told


@contextmanager
def _in_no_mode(module: nn.Module) -> Iterator[None]:
    """Have a network be called as ever inside the block: its two halves of guidance are not in one slice."""
    mode = vars(module).pop(MODE, None)
    try:
        yield
    finally:
        if mode is not None:
            setattr(module, MODE, mode)


def _why_whole(given: dict[str, Any], batch: int) -> str:
    """Say why a call can't be cut, for what it is given by name; empty where it can."""
    for name, value in given.items():
        tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.ndim]
        if name not in (*BATCHED, *SHARED) and tensors:
            return f"which rows of its {name} belong to which sample is not known"
        if name in BATCHED and any(len(tensor) not in (1, batch) for tensor in tensors):
            return f"its {name} has neither one row nor {batch}"
    return ""


def _cut(given: dict[str, Any], batch: int, rows: slice) -> dict[str, Any]:
    """Return what the samples of some rows are given."""

    def cut(value: Any) -> Any:
        return value[rows] if isinstance(value, Tensor) and value.ndim and len(value) == batch else value

    return {name: tree_map(cut, value) if name in BATCHED else value for name, value in given.items()}


def _joined(parts: list[Any]) -> Any:
    """Put the results of slices together, of whatever structure."""
    leaves = [tree_flatten(part)[0] for part in parts]
    joined = [torch.cat(found) if isinstance(found[0], Tensor) else found[0] for found in zip(*leaves, strict=True)]
    return tree_unflatten(joined, tree_flatten(parts[0])[1])


@dataclass
class WorksInSlices(CallOver):
    """The change that puts a call in slices over a network's."""

    slice_size: int = 1

    def make(self, inner: Callable[..., Any]) -> SlicedCall:
        """Return the call over the network's own."""
        return SlicedCall(self.module, inner, self.slice_size)


def apply(pipe: Any, options: DenoiserSlicing) -> Journal:
    """Exact: have denoiser and ControlNets work on a few samples of the batch at a time."""
    tried = f"{options.action}()"
    name, denoiser = denoiser_of(pipe, tried)
    if (kind := type(denoiser).__name__) not in SLICED_DENOISERS:
        needed = f"one of {', '.join(SLICED_DENOISERS)}"
        raise NotSupportedError(
            explain_failure(tried, f"a {kind} for its {name}", needed, "make fewer pictures in a call")
        )
    with journaling() as journal:
        for network in unet_and_controlnets(pipe, tried):
            if type(network).__name__ in NETWORKS:
                change = WorksInSlices(network, slice_size=options.slice_size)
                change.install()
                journal.add(change)
        journal.note("a picture is two samples with guidance; what is left of a batch is a smaller slice")
    return journal
