"""What every kernel states of itself, and the checks that say why one cannot run.

A kernel is a function of tensors with a plain PyTorch equal beside it: same arguments, same result to rounding. It
computes in fp32 whatever comes in and rounds once, at the end. None has a gradient.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import NotSupportedError, explain_failure

T = TypeVar("T")

SM = tuple[int, int]
"""Compute capability of an NVIDIA GPU, such as (8, 6)."""

Place = tuple[str, torch.dtype]
"""A type of device and a dtype, such as ("cuda", torch.float16)."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_TRITON_SOURCE = "https://triton-lang.org/main/getting-started/installation.html"


def rounded_once(fp32: float) -> dict[torch.dtype, float]:
    """Tolerances of a kernel that computes in fp32, to `fp32`, and rounds its result to the dtype once.

    That rounding is 2^-11 of a value at most in float16 and 2^-8 in bfloat16; a twentieth more is for what came before.
    """
    return {torch.float32: fp32, torch.float16: 5.2e-4, torch.bfloat16: 4.1e-3}


@dataclass(frozen=True, kw_only=True)
class KernelLimits:
    """What one kernel accepts.

    Attributes:
        kernel: its name, as reasons print it.
        layout: the memory layout of its inputs, in words.
        dtypes: of its activations; weights may be of any of these, whatever the activations are.
        lowest_sm, lowest_sm_by_dtype: oldest NVIDIA generation, overall and for single dtypes.
        highest_sm: the newest one; None for no end.
        sources: for each field above that holds a number, where the number is from.
    """

    kernel: str
    layout: str
    dtypes: tuple[torch.dtype, ...] = DTYPES
    lowest_sm: SM = (7, 0)
    lowest_sm_by_dtype: Mapping[torch.dtype, SM] = field(default_factory=lambda: {torch.bfloat16: (8, 0)})
    highest_sm: SM | None = None
    sources: Mapping[str, str] = field(
        default_factory=lambda: {
            "lowest_sm": _TRITON_SOURCE,
            "lowest_sm_by_dtype": "facts/device.py: older cards only emulate bfloat16",
            "highest_sm": "Triton compiles for what is newer",
        }
    )


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One entry of `KERNELS`: a kernel, its plain equal, and how far the two may lie apart.

    Attributes:
        run, plain: the kernel and PyTorch's own way; both take the same arguments, `run` also `launch`.
        misfits: takes the arguments of `run` and says what of the tensors themselves does not suit it. Asks no device,
            so that torch.compile can trace it.
        reasons: `misfits`, and why the kernel cannot run on the device of the tensors.
        limits: what it accepts, as data.
        tolerance: largest difference from the fp64 result over that result's largest magnitude, by dtype.
    """

    run: Callable[..., Any]
    plain: Callable[..., Any]
    misfits: Callable[..., list[str]]
    reasons: Callable[..., list[str]]
    limits: KernelLimits
    tolerance: Mapping[torch.dtype, float]

    def places(self) -> frozenset[Place]:
        """Where it can run in this process; empty when it cannot at all, for the reasons `unavailable()` gives.

        With several GPUs it is what all of them take, since a pipeline may be moved between them.
        """
        if unavailable():
            return frozenset()
        if interpreting():
            return frozenset(("cpu", dtype) for dtype in self.limits.dtypes)
        levels = {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}
        return self.places_at("cuda", *levels)

    def places_at(self, device_type: str, *levels: tuple[int, int]) -> frozenset[Place]:
        """Where it can run on GPUs of these SM levels, named `device_type`: "meta" for what stands in for them."""
        return frozenset(
            (device_type, dtype)
            for dtype in self.limits.dtypes
            if not any(dtype_reasons(self.limits, dtype, level) for level in levels)
        )


@cache
def triton_reasons() -> tuple[str, ...]:
    """Why Triton cannot be used, empty when it can; imports it, once."""
    if importlib.util.find_spec("triton") is None:
        return ("Triton is not installed",)
    try:
        importlib.import_module("triton")
    except Exception as error:  # a Triton built for another torch can fail in any way
        return (f"Triton cannot be imported: {type(error).__name__}: {error}",)
    return ()


def interpreting() -> bool:
    """Whether Triton's interpreter was asked for, in which kernels run on the CPU, slowly, for tests."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def unavailable() -> list[str]:
    """Why no kernel can run in this process, whatever its inputs; empty when they can. Imports Triton."""
    reasons = list(triton_reasons())
    if not interpreting():
        if not torch.cuda.is_available():
            reasons.append("there is no CUDA device")
        elif torch.version.hip is not None:
            reasons.append("the kernels were tried on NVIDIA GPUs only, this torch is built for AMD")
    return reasons


def is_available() -> bool:
    """Whether kernels can run in this process; `unavailable()` says why not."""
    return not unavailable()


def device_reasons(limits: KernelLimits, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Why a kernel cannot take activations of this dtype on this device; empty when it can."""
    sm = None
    reasons = unavailable()
    if device.type == "cuda" and not reasons:
        sm = _capability(device)
    elif device.type != "cuda" and not interpreting():
        reasons.append(f"{limits.kernel} runs on NVIDIA GPUs, the tensor is on {device.type}")
    return reasons + dtype_reasons(limits, dtype, sm)


def dtype_reasons(limits: KernelLimits, dtype: torch.dtype, sm: SM | None) -> list[str]:
    """Why a kernel cannot take a dtype on a GPU of level `sm` (None: not asked); empty when it can. Asks no device.

    >>> dtype_reasons(KernelLimits(kernel="geglu", layout="contiguous"), torch.bfloat16, (7, 5))
    ['geglu in bfloat16 needs SM 8.0, the GPU has 7.5']
    """
    if dtype not in limits.dtypes:
        names = " or ".join(_name(accepted) for accepted in limits.dtypes)
        return [f"{limits.kernel} takes {names}, the tensor is {_name(dtype)}"]
    lowest = max(limits.lowest_sm, limits.lowest_sm_by_dtype.get(dtype, (0, 0)))
    if sm is not None and sm < lowest:
        return [f"{limits.kernel} in {_name(dtype)} needs SM {lowest[0]}.{lowest[1]}, the GPU has {sm[0]}.{sm[1]}"]
    if sm is not None and limits.highest_sm is not None and sm > limits.highest_sm:
        newest = ".".join(map(str, limits.highest_sm))
        return [f"{limits.kernel} is for GPUs up to SM {newest}, this one has {sm[0]}.{sm[1]}"]
    return []


def vector_reasons(
    limits: KernelLimits, like: Tensor, shape: tuple[int, ...], rows_anywhere: bool = False, **vectors: Tensor | None
) -> list[str]:
    """Why `vectors` (weight, bias, ...) do not fit beside the activations `like`: shape, dtype, device, layout.

    With `rows_anywhere`, only what lies in the last dimension has to lie together.
    """
    reasons = []
    for name, vector in vectors.items():
        if vector is None:
            continue
        if tuple(vector.shape) != shape:
            reasons.append(f"{name} must be {list(shape)}, it is {list(vector.shape)}")
        if vector.dtype not in limits.dtypes:
            reasons.append(f"{name} is {_name(vector.dtype)}, which {limits.kernel} does not take")
        if vector.device != like.device:
            reasons.append(f"{name} is on {vector.device}, the activations are on {like.device}")
        together = vector[:1] if rows_anywhere else vector
        if not together.is_contiguous():
            reasons.append(f"{name} is not contiguous")
    return reasons


def channels_innermost(x: Tensor) -> bool:
    """Whether `[B, C, ..]` lies in memory as torch.channels_last has it, whatever its rank."""
    return x.movedim(1, -1).is_contiguous()


def grad_reasons(limits: KernelLimits, *tensors: Tensor | None) -> list[str]:
    """Why a kernel refuses tensors that a gradient is recorded for; empty under `torch.no_grad()`."""
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return [f"{limits.kernel} has no gradient, and autograd is recording one"]
    return []


def refuse(limits: KernelLimits, reasons: list[str]) -> None:
    """Raise what a kernel says when called outside its limits; do nothing without reasons.

    Raises:
        NotSupportedError: with every reason.
    """
    if not reasons:
        return
    raise NotSupportedError(
        explain_failure(
            f"the Triton kernel {limits.kernel}",
            "; ".join(reasons),
            f"{limits.layout}, an NVIDIA GPU, Triton, and no gradient",
            f"call {limits.kernel}_plain(), which takes the same arguments, or run under torch.no_grad()",
        )
    )


def optional(like: Tensor, *vectors: Tensor | None) -> tuple[Tensor | int, ...]:
    """What a launch is given for vectors that may be absent: a pointer for each, then a flag for each.

    An absent one's pointer is that of `like`: any valid one, which is not read.
    """
    pointers = (like if vector is None else vector for vector in vectors)
    return (*pointers, *(int(vector is not None) for vector in vectors))


def on_device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Make the device of `x` the current one, where Triton launches, whichever GPU is current."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()


def launch_from(kind: type[T], numbers: Sequence[int]) -> T:
    """A launch dataclass from its values in order, which is how an operator of torch can be given one."""
    names = (item.name for item in fields(kind))  # type: ignore[arg-type]
    return kind(**dict(zip(names, numbers, strict=True)))


@cache
def _capability(device: torch.device) -> SM:
    return torch.cuda.get_device_capability(device)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
