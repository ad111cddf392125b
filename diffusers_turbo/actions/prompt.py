"""Keys and values of the prompt, projected once a call of the pipeline instead of at every step.

Before a network runs, the prompt is sent through the key and value projections of all its cross-attention layers, and
what they give, side by side, takes the prompt's place as `encoder_hidden_states`; each projection then only cuts its
own stripe out. So nothing is hidden from graphs and compilers: to them it is an ordinary input, the same tensor at
every step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import NotSupportedError, explain_failure
from ..graphs.watch import Watch
from ..planning.options import PromptProjections
from .calls import CallOver
from .components import require_plain_weights, unet_and_controlnets
from .stripes import Stripes, cross_attention_layers, standing
from .undo import Journal, journaling

TRIED = "enable_prompt_projections()"


class PromptCall:
    """Stands over a network's call and projects the prompt ahead, while a call of the pipeline runs."""

    def __init__(self, inner: Callable[..., Any], stripes: Stripes) -> None:
        """Stand over `inner`."""
        self.inner, self.stripes = inner, stripes
        self.calls = self.projected = 0
        self.reason: str | None = None
        self._inside = 0
        self._layers: list[Any] = []
        self._watch: Watch | None = None
        self._weights: list[nn.Parameter] = []
        self._made: tuple[Tensor, Any, Tensor] | None = None

    def enter_call(self) -> None:
        """A call of the pipeline begins: see which modules project the prompt now."""
        self._inside += 1
        self.reason = self.stripes.lay()
        self._layers = cross_attention_layers(self.stripes.root)
        projections = nn.ModuleList(standing(self._layers))
        self._watch, self._weights = Watch(projections), list(projections.parameters())

    def leave_call(self) -> None:
        """A call of the pipeline ends, and what was made for it goes."""
        self._inside -= 1
        self._made = self._watch = None
        self._layers, self._weights = [], []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network, on the prompt projected ahead where that can be."""
        self.calls += 1
        if self._inside and self.reason is None and not torch.is_grad_enabled():
            if len(args) > 2:
                args = (*args[:2], self._ahead(args[2], kwargs), *args[3:])
            elif "encoder_hidden_states" in kwargs:
                kwargs["encoder_hidden_states"] = self._ahead(kwargs["encoder_hidden_states"], kwargs)
        return self.inner(*args, **kwargs)

    def _ahead(self, prompt: Any, kwargs: dict[str, Any]) -> Any:
        if not isinstance(prompt, Tensor) or prompt.is_inference():
            return prompt  # the changes of an inference tensor can't be noticed
        if kwargs.get("cross_attention_kwargs"):
            return prompt  # such as a LoRA's scale, which holds inside the network only
        if not self.stripes.are_on(standing(self._layers)):
            return prompt  # an adapter came or went between two steps
        state = (prompt._version, self._state())
        if self._made is None or self._made[0] is not prompt or self._made[1] != state:
            self._made = (prompt, state, self.stripes.project(prompt))
            self.projected += 1
        return self._made[2]

    def _state(self) -> tuple[Any, ...]:
        """What the projections' results depend on beside the prompt, and a callback may change between two steps."""
        weights = [(weight.data_ptr(), weight._version) for weight in self._weights]
        return (*weights, *(self._watch.numbers() if self._watch else ()))

    def tell(self) -> str:
        """Say what happened so far."""
        told = f"{type(self.stripes.root).__name__}: {self.calls} calls, prompt projected {self.projected} times"
        return f"{told}; not ahead: {self.reason}" if self.reason else told


@dataclass
class ProjectsAhead(CallOver):
    """One network whose prompt is projected ahead; also the call scope in which that holds."""

    stripes: Stripes | None = None

    def make(self, inner: Callable[..., Any]) -> PromptCall:
        """Return the call over the network's own."""
        if self.stripes is None:
            self.stripes = Stripes(self.module)
        return PromptCall(inner, self.stripes)

    def revert(self) -> str | None:
        """Give projections and network their own forward and call back."""
        left = self.stripes.lift() if self.stripes else None
        return super().revert() or left

    @contextmanager
    def around_call(self, pipe: Any) -> Iterator[None]:
        """Project ahead inside the block."""
        call = self.call
        if call is None:
            yield
            return
        call.enter_call()
        try:
            yield
        finally:
            call.leave_call()


def apply(pipe: Any, options: PromptProjections) -> Journal:
    """Exact: project keys and values of the prompt once a call, for the UNet and its ControlNets."""
    require_plain_weights(pipe, TRIED)
    with journaling() as journal:
        for index, network in enumerate(unet_and_controlnets(pipe, TRIED)):
            change = ProjectsAhead(network)
            change.install()
            journal.add(change)
            journal.scopes.append(change)
            assert change.stripes is not None
            reason = change.stripes.lay()
            if reason and index == 0:
                needed, do = "a UNet whose cross-attention layers take the prompt as it comes", "leave this switch off"
                raise NotSupportedError(explain_failure(TRIED, reason, needed, do))
            layers = len(cross_attention_layers(network))
            journal.note(f"{type(network).__name__}: {reason or f'{layers} cross-attention layers'}")
    return journal
