"""Which attention kernels really run: one small real call each, through the operators themselves.

torch's `sdpa_kernel` flags are process-wide, so a probe that flipped them would be seen by other threads. The aten
operators behind `scaled_dot_product_attention` are called directly instead: each either runs on this device with this
dtype or raises.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

KernelTable = dict[str, tuple[str, ...]]
"""Backend or operator name -> the dtypes it ran with, by name."""

_DTYPES = ("float16", "bfloat16", "float32")
_HALVES_ONLY = ("cudnn",)
"""Backends that torch itself gives nothing in float32 (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp): cuDNN
would take most of a second to plan a call whose answer is NaN."""

_HEADS, _TOKENS, _HEAD_DIM = 2, 128, 64
"""A head size and a length that every fused kernel takes."""

# Half precision rounds a sum of 128 terms of size one to about 1e-3; a kernel that misreads its input is off by 0.1
# and more.
_TOLERANCE = 2e-2

Attend = Callable[["torch.Tensor", "torch.Tensor", "torch.Tensor"], Any]


def probe_sdpa(device: str, dtypes: Sequence[str] = _DTYPES) -> KernelTable:
    """Run each SDPA backend once per dtype on `device` and return those that gave the right answer.

    Names are those of `enable_sdpa(backend=)`: flash, efficient, cudnn, math. Never raises: an operator that fails,
    for whatever reason, is not in the table.
    """
    import torch

    aten = torch.ops.aten
    calls: dict[str, Attend] = {
        "flash": lambda q, k, v: aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False)[0],
        "efficient": lambda q, k, v: aten._scaled_dot_product_efficient_attention(q, k, v, None, False)[0],
        "cudnn": lambda q, k, v: aten._scaled_dot_product_cudnn_attention(q, k, v, None, False)[0],
        "math": lambda q, k, v: aten._scaled_dot_product_attention_math(q, k, v)[0],
    }
    kind = device.partition(":")[0]
    if kind == "cpu":
        calls = {
            "flash": lambda q, k, v: aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0],
            "math": calls["math"],
        }
    elif kind == "mps":
        calls = {"math": lambda q, k, v: aten._scaled_dot_product_attention_math_for_mps(q, k, v)[0]}
    halves = [dtype for dtype in dtypes if dtype != "float32"]
    tried = {
        name: _dtypes_that_run(call, device, halves if name in _HALVES_ONLY else dtypes) for name, call in calls.items()
    }
    return {name: ran for name, ran in tried.items() if ran}


def probe_xformers(device: str) -> KernelTable:
    """Run each of xFormers' forward operators once per dtype on `device`; return those that gave the right answer.

    An installed xFormers is often unusable (built for another torch or CUDA), and says so only when called.
    Operators are named by their NAME. Never raises.
    """
    if not device.startswith("cuda"):
        return {}
    try:
        fmha = _import_fmha()
    except Exception:  # a broken build may raise anything at import: it is then not usable
        return {}
    table: KernelTable = {}
    for op in fmha.ALL_FW_OPS:

        def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, op: Any = op) -> Any:
            # xFormers wants [B, N, H, D]
            turned = (x.transpose(1, 2).contiguous() for x in (q, k, v))
            return fmha.memory_efficient_attention_forward(*turned, op=op).transpose(1, 2)

        if dtypes := _dtypes_that_run(call, device):
            table[str(op.NAME)] = dtypes
    return table


def _import_fmha() -> Any:
    """Import xFormers' attention without its warnings: that it can't load its kernels is what the probe finds out."""
    logger = logging.getLogger("xformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from xformers.ops import fmha
    finally:
        logger.setLevel(level)
    return fmha


def _dtypes_that_run(call: Attend, device: str, dtypes: Sequence[str] = _DTYPES) -> tuple[str, ...]:
    """Return the dtypes for which `call` agrees with attention written out in float32 on the CPU."""
    import torch

    # waves, not random numbers: a probe must not move the random generator's state
    waves = torch.arange(3 * _HEADS * _TOKENS * _HEAD_DIM, dtype=torch.float32).mul(0.37).sin()
    q, k, v = waves.reshape(3, 1, _HEADS, _TOKENS, _HEAD_DIM)
    expected = torch.softmax(q @ k.transpose(-1, -2) / _HEAD_DIM**0.5, dim=-1) @ v
    ran = []
    for name in dtypes:
        try:
            with torch.no_grad():
                got = call(*(x.to(device=device, dtype=getattr(torch, name)) for x in (q, k, v)))
                # a kernel may also run with a dtype it misreads: cuDNN takes float32 and answers NaN (seen on an H100,
                # torch 2.11). Copying to the host also waits for a launch that fails late.
                right = torch.allclose(got.float().cpu(), expected, atol=_TOLERANCE, rtol=0)
        except Exception:  # whatever an operator raises, the answer is the same: it does not run here
            continue
        if right:
            ran.append(name)
    return tuple(ran)
