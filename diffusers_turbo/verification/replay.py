"""The same latents and embeddings for two pipelines: what one prepares is recorded and handed to the other.

Passing a seed is not enough: a generator draws other numbers for other dtypes, and a text encoder in half precision
gives other embeddings. So the methods with which a pipeline prepares a call are replaced, on the object and for one
call, by ones that record, or that give back what was recorded in the pipeline's own dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..actions.undo import Journal
from ..errors import NotSupportedError, explain_failure

PREPARING = ("encode_prompt", "prepare_latents", "prepare_mask_latents", "prepare_image_latents", "prepare_image")
"""The methods of diffusers' pipelines whose results are the inputs of the denoising loop."""


@dataclass
class Prepared:
    """One call of a preparing method: its name, what it returned (on the CPU), and the generators' states after it."""

    name: str
    result: Any
    states: list[Tensor]


@dataclass
class Tape:
    """What one call of a pipeline prepared, in order."""

    calls: list[Prepared] = field(default_factory=list)
    draws_later: bool = False

    @contextmanager
    def recording(self, pipe: Any, generators: Sequence[torch.Generator]) -> Iterator[None]:
        """Record what `pipe` prepares inside the block, and whether it draws numbers afterwards."""
        depth = 0

        def replaced(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
            def record(*args: Any, **kwargs: Any) -> Any:
                nonlocal depth
                depth += 1
                try:
                    result = original(*args, **kwargs)
                finally:
                    depth -= 1
                if not depth:  # a preparing method may call another: only the outer result is used
                    self.calls.append(Prepared(name, _mapped(result, _to_host), _states(generators)))
                return result

            return record

        with _methods(pipe, replaced):
            yield
        last = self.calls[-1].states if self.calls else _states(generators)
        self.draws_later = any(not torch.equal(now, then) for now, then in zip(_states(generators), last, strict=True))

    @contextmanager
    def replaying(self, pipe: Any, generators: Sequence[torch.Generator], dtype: torch.dtype) -> Iterator[None]:
        """Let `pipe` prepare the recorded tensors inside the block, in `dtype` on its own device.

        Raises:
            NotSupportedError: the recorded call drew noise while denoising, whose numbers depend on the dtype; or
                this pipeline prepares its calls differently.
        """
        if self.draws_later and dtype != torch.float32:
            found = f"{type(pipe.scheduler).__name__}, which draws noise in every step; its numbers differ in {dtype}"
            do = "set DDIM, Euler, DPM++ 2M or UniPC for the comparison"
            raise NotSupportedError(explain_failure("verifying", found, "a scheduler that draws no noise", do))
        waiting = list(self.calls)
        device = pipe._execution_device

        def replaced(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
            def give_back(*args: Any, **kwargs: Any) -> Any:
                if not waiting or waiting[0].name != name:
                    expected = waiting[0].name if waiting else "nothing more"
                    found = f"{type(pipe).__name__}.{name}() where the reference called {expected}"
                    needed = "the same pipeline class and arguments on both sides"
                    raise NotSupportedError(explain_failure("verifying", found, needed, "compare like with like"))
                recorded = waiting.pop(0)
                for generator, state in zip(generators, recorded.states, strict=True):
                    generator.set_state(state)
                return _mapped(recorded.result, lambda tensor: _to_pipeline(tensor, device, dtype))

            return give_back

        with _methods(pipe, replaced):
            yield


@contextmanager
def _methods(pipe: Any, replaced: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Set replacements of the preparing methods on the pipeline object, and remove them again."""
    journal = Journal()
    for name in PREPARING:
        if callable(original := getattr(pipe, name, None)):
            journal.set_attribute(pipe, name, replaced(name, original))
    try:
        yield
    finally:
        journal.revert()


def _states(generators: Sequence[torch.Generator]) -> list[Tensor]:
    return [generator.get_state() for generator in generators]


def _to_host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _to_pipeline(tensor: Tensor, device: Any, dtype: torch.dtype) -> Tensor:
    return tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply `change` to every tensor in nested tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (tuple, list)):
        return type(value)(_mapped(item, change) for item in value)
    if isinstance(value, dict):
        return {key: _mapped(item, change) for key, item in value.items()}
    return value
