"""What the caller wants, checked; and the situation a plan is made for: facts and request together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import InvalidOptionError, explain_failure
from .options import CompileUNet, Options, dtype_name
from .timing import STEPS
from .units import parse_bytes

if TYPE_CHECKING:
    from ..facts.device import DeviceFacts
    from ..facts.pipeline import PipelineFacts

TIERS = ("instant", "compiled", "fastest", "none")
DTYPES = ("keep", "auto", "float16", "bfloat16", "float32")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the pictures will be, and what the plan may use.

    Attributes:
        height, width: pixels; None takes the model's own.
        batch_size: pictures per call.
        steps: denoising steps of a call, at each of which offload by layers moves weights.
        images: how many pictures will be made in all, None when unknown: decides whether compiling pays.
        vram_budget: bytes, or text such as "6GB", that the plan may use at most; None is what is free.
        dtype: "keep", "auto", "float16", "bfloat16" or "float32".
        exact: whether switches that change the picture beyond rounding are forbidden.
        tier: "instant", "compiled", "fastest" (one of the two, by `images`), "none", or None: "fastest" where it was
            measured, and none elsewhere.
        cache_dir: where compiled code is kept for later processes, as `compile_unet(cache_dir=)` takes it.
    """

    height: int | None = None
    width: int | None = None
    batch_size: int = 1
    steps: int = STEPS
    images: int | None = None
    vram_budget: int | str | None = None
    dtype: str = "keep"
    exact: bool = False
    tier: str | None = None
    cache_dir: bool | str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "vram_budget", parse_bytes(self.vram_budget, name="vram_budget"))
        object.__setattr__(self, "dtype", dtype_name(self.dtype))
        if self.dtype not in DTYPES:
            raise _refuse("dtype", self.dtype, f"one of {', '.join(DTYPES)}", 'use "keep" or "auto"')
        if self.tier not in (None, *TIERS):
            raise _refuse("tier", self.tier, f"one of {', '.join(TIERS)}, or None", 'use "fastest", or leave it out')
        for name in ("height", "width", "batch_size", "steps", "images"):
            value = getattr(self, name)
            if value is None and name not in ("batch_size", "steps"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
                raise _refuse(name, value, "a positive integer", f"give {name} as a positive number")
        if not isinstance(self.exact, bool):
            raise _refuse("exact", self.exact, "True or False", "give True or False for exact")
        object.__setattr__(self, "cache_dir", CompileUNet(cache_dir=self.cache_dir).cache_dir)

    @property
    def budget_bytes(self) -> int | None:
        """The budget in bytes, None when there is none."""
        return parse_bytes(self.vram_budget, name="vram_budget")


@dataclass(frozen=True, kw_only=True)
class Situation:
    """Facts and request, with the size settled."""

    pipeline: PipelineFacts
    device: DeviceFacts
    request: Request
    height: int
    width: int

    @property
    def samples(self) -> int:
        """What the denoiser sees of the batch: with guidance two of each picture."""
        return self.request.batch_size * self.pipeline.guidance_copies

    @property
    def pixels(self) -> int:
        """Of all pictures of the batch."""
        return self.height * self.width * self.request.batch_size

    @property
    def usable_bytes(self) -> int | None:
        """What the plan may fill: free memory and what the pipeline itself holds there, within the budget.

        None when neither is known.
        """
        own = sum(
            part.parameter_bytes
            for part in self.pipeline.components
            if any(_same_device(place, self.device.device) for place in part.devices)
        )
        free = self.device.free_bytes + own if self.device.free_bytes else None
        limits = [limit for limit in (free, self.request.budget_bytes) if limit is not None]
        return min(limits, default=None)


def _same_device(one: str, other: str) -> bool:
    """Whether two names may mean one device: "cuda" is any of its kind.

    >>> _same_device("cuda", "cuda:1"), _same_device("cuda:0", "cuda:1")
    (True, False)
    """
    (kind, _, index), (other_kind, _, other_index) = one.partition(":"), other.partition(":")
    return kind == other_kind and ("" in (index, other_index) or index == other_index)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One switch, taken or left off, and one sentence why."""

    options: Options
    taken: bool
    reason: str


def take(options: Options, reason: str) -> Verdict:
    """Return the verdict to switch it on."""
    return Verdict(options=options, taken=True, reason=reason)


def leave(options: Options, reason: str) -> Verdict:
    """Return the verdict to leave it off."""
    return Verdict(options=options, taken=False, reason=reason)


def settle(pipeline: PipelineFacts, device: DeviceFacts, request: Request) -> Situation:
    """Put facts and request together and check the size against the model.

    Raises:
        InvalidOptionError: height or width is no multiple of what the model needs.
    """
    height = request.height or pipeline.default_height
    width = request.width or pipeline.default_width
    for name, value in (("height", height), ("width", width)):
        if value % pipeline.size_multiple:
            below = max(1, value // pipeline.size_multiple) * pipeline.size_multiple
            raise _refuse(
                name,
                value,
                f"a multiple of {pipeline.size_multiple} for {pipeline.class_name}",
                f"use {name}={below} or {name}={below + pipeline.size_multiple}",
            )
    return Situation(pipeline=pipeline, device=device, request=request, height=height, width=width)


def _refuse(name: str, value: object, needed: str, do: str) -> InvalidOptionError:
    return InvalidOptionError(explain_failure(f"plan({name}={value!r})", f"{name} = {value!r}", needed, do))
