"""What a verification runs: prompts, seeds, size and steps. Plain values, checked when made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import InvalidOptionError, explain_failure

PROMPTS = (
    "a red fox in the snow",
    "a bowl of fruit on a wooden table",
    "a lighthouse at night",
    "an old man reading a newspaper",
    "a blue bicycle against a brick wall",
    "a rocket above the clouds",
    "a city street in the rain",
    "a slice of pizza",
)
"""What is drawn when the caller names no prompt."""

PAIRS = 8
STEPS = 20


def _nothing(pictures: int) -> Mapping[str, Any]:
    return {}


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Prompt-and-seed pairs and the arguments of every call.

    Attributes:
        prompts: one a pair.
        seeds: one a pair.
        steps: denoising steps.
        height, width: pixels; None is the model's own.
        guidance_scale: None is the pipeline's own.
        batch_size: pairs per call.
        more: further arguments of a call, made from the number of its pictures (an image, a mask).
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: int = STEPS
    height: int | None = None
    width: int | None = None
    guidance_scale: float | None = None
    batch_size: int = 1
    more: Callable[[int], Mapping[str, Any]] = _nothing

    def __post_init__(self) -> None:
        if not self.prompts or len(self.prompts) != len(self.seeds):
            raise _refuse(f"{len(self.prompts)} prompts and {len(self.seeds)} seeds", "one seed for each prompt")
        for name in ("steps", "batch_size", "height", "width"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and not isinstance(value, bool) and value > 0):
                raise _refuse(f"{name} = {value!r}", f"a positive integer for {name}")

    def batches(self) -> Iterator[tuple[list[str], list[int]]]:
        """Iterate over the prompts and seeds of each call."""
        for start in range(0, len(self.prompts), self.batch_size):
            end = start + self.batch_size
            yield list(self.prompts[start:end]), list(self.seeds[start:end])


def make_inputs(
    prompts: str | list[str] | tuple[str, ...] | None = None, pairs: int | None = None, **rest: Any
) -> Inputs:
    """Pair prompts with seeds 0, 1, 2 ...; `pairs` repeats or cuts the prompts, by default each is used once.

    Raises:
        InvalidOptionError: no prompt, or a number that is not positive.

    >>> make_inputs(["a cat", "a dog"], pairs=3).prompts
    ('a cat', 'a dog', 'a cat')
    """
    given = (prompts,) if isinstance(prompts, str) else tuple(prompts or ())
    if not all(isinstance(prompt, str) for prompt in given):
        raise _refuse("prompts that are not text", "prompts as text")
    if pairs is None:
        pairs = len(given) or PAIRS
    if not isinstance(pairs, int) or isinstance(pairs, bool) or pairs < 1:
        raise _refuse(f"pairs = {pairs!r}", "a positive number of pairs")
    given = given or PROMPTS
    chosen = tuple(given[index % len(given)] for index in range(pairs))
    return Inputs(prompts=chosen, seeds=tuple(range(pairs)), **rest)


def _refuse(found: str, needed: str) -> InvalidOptionError:
    return InvalidOptionError(explain_failure("verifying", found, needed, "correct it, or leave it out"))
