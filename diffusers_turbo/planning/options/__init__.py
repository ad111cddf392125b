"""One frozen value per action: what each switch accepts, checked when the value is made.

Every class names the pipeline method it stands for (`action`), the concern it belongs to (`slot`), and whether its
pictures are those of the plain pipeline up to rounding (`exact`; if not, `lossy_reason` says what changes).
"""

from __future__ import annotations

import difflib
from dataclasses import fields
from typing import Any

from ...errors import InvalidOptionError, explain_failure
from ..base import Options
from .attention import SDPA_BACKENDS, FusedQKV, NaiveAttention, SDPAAttention, SlicedAttention, XFormersAttention
from .compiling import COMPILE_MODES, CompileTransformer, CompileUNet, CompileVAE, LoadExportedUNet, TraceUNet
from .memory import (
    OFFLOAD_TYPES,
    SLICED_DENOISERS,
    DenoiserSlicing,
    GroupOffload,
    MemoryFallback,
    ModelOffload,
    PartialOffload,
    SequentialOffload,
    VAEExactTiling,
    VAESlicing,
    VAETiling,
)
from .numerics import HALF_DTYPES, TF32, ChannelsLast, HalfPrecision, dtype_name
from .speed import (
    DOUBLING_PIPELINES,
    SYNC_FREE_SCHEDULERS,
    CUDAGraphs,
    FusedKernels,
    PointwiseMatmul,
    PromptProjections,
    SharedGuidance,
    SyncFreeLoop,
    TimeProjections,
    VAEUpcastCopy,
)

__all__ = [
    "ACTIONS",
    "COMPILE_MODES",
    "DOUBLING_PIPELINES",
    "HALF_DTYPES",
    "OFFLOAD_TYPES",
    "SDPA_BACKENDS",
    "SLICED_DENOISERS",
    "SYNC_FREE_SCHEDULERS",
    "TF32",
    "CUDAGraphs",
    "ChannelsLast",
    "CompileTransformer",
    "CompileUNet",
    "CompileVAE",
    "DenoiserSlicing",
    "FusedKernels",
    "FusedQKV",
    "GroupOffload",
    "HalfPrecision",
    "LoadExportedUNet",
    "MemoryFallback",
    "ModelOffload",
    "NaiveAttention",
    "Options",
    "PartialOffload",
    "PointwiseMatmul",
    "PromptProjections",
    "SDPAAttention",
    "SequentialOffload",
    "SharedGuidance",
    "SlicedAttention",
    "SyncFreeLoop",
    "TimeProjections",
    "TraceUNet",
    "VAEExactTiling",
    "VAESlicing",
    "VAETiling",
    "VAEUpcastCopy",
    "XFormersAttention",
    "dtype_name",
    "make_options",
]

ACTIONS: dict[str, type[Options]] = {
    cls.action: cls
    for cls in (
        HalfPrecision,
        ChannelsLast,
        PointwiseMatmul,
        FusedQKV,
        NaiveAttention,
        SDPAAttention,
        XFormersAttention,
        SlicedAttention,
        TF32,
        VAESlicing,
        VAEExactTiling,
        VAETiling,
        VAEUpcastCopy,
        FusedKernels,
        ModelOffload,
        PartialOffload,
        GroupOffload,
        SequentialOffload,
        SyncFreeLoop,
        CompileUNet,
        CompileTransformer,
        CompileVAE,
        TraceUNet,
        LoadExportedUNet,
        CUDAGraphs,
        DenoiserSlicing,
        TimeProjections,
        PromptProjections,
        SharedGuidance,
        MemoryFallback,
    )
}
"""Every action by its method's name, in the order in which slots are applied."""


def make_options(action: str, **arguments: Any) -> Options:
    """Make the options of an action from its method's name and arguments.

    Raises:
        InvalidOptionError: no such action, no such argument, or a value outside what the action accepts.

    >>> make_options("enable_sdpa", backend="flash")
    SDPAAttention(backend='flash')
    """
    if action not in ACTIONS:
        close = difflib.get_close_matches(action, ACTIONS, n=3) or list(ACTIONS)
        raise InvalidOptionError(
            explain_failure(f"{action}()", "no action of this name", f"one of {', '.join(close)}", "correct the name")
        )
    cls = ACTIONS[action]
    names = [field.name for field in fields(cls)]
    if unknown := [name for name in arguments if name not in names]:
        raise InvalidOptionError(
            explain_failure(
                f"{action}({', '.join(unknown)}=...)",
                f"no argument {', '.join(unknown)}",
                f"arguments among {', '.join(names)}" if names else "no arguments",
                "correct the name or leave it out",
            )
        )
    return cls(**arguments)
