"""Formats of the weights and of the products: dtype, layout, TF32."""

from __future__ import annotations

from dataclasses import dataclass

from ..base import Options

HALF_DTYPES = ("float16", "bfloat16")

_DTYPE_ALIASES = {
    "fp16": "float16",
    "half": "float16",
    "bf16": "bfloat16",
    "fp32": "float32",
    "float": "float32",
    "full": "float32",
}


def dtype_name(value: object) -> str:
    """Name a dtype as torch does, without torch: "fp16", "torch.float16" and torch.float16 are all "float16".

    >>> dtype_name("bf16")
    'bfloat16'
    """
    name = str(value).removeprefix("torch.")
    return _DTYPE_ALIASES.get(name, name)


@dataclass(frozen=True, kw_only=True)
class ChannelsLast(Options):
    """Keep the convolutions' weights and activations in the channels-last layout."""

    action = "enable_channels_last"
    slot = "layout"


@dataclass(frozen=True, kw_only=True)
class TF32(Options):
    """Let fp32 convolutions and matrix products run on TF32 tensor cores during this pipe's calls. LOSSY."""

    action = "enable_tf32"
    slot = "tf32"
    exact = False
    lossy_reason = "TF32 keeps 10 bits of each factor's mantissa, fp32 keeps 23"


@dataclass(frozen=True, kw_only=True)
class HalfPrecision(Options):
    """Cast the weights to a 16-bit dtype; None takes the dtype the model was made for. LOSSY."""

    action = "enable_half_precision"
    slot = "precision"
    exact = False
    lossy_reason = "16-bit weights and activations round every value (float16 keeps 10 bits, bfloat16 7)"

    dtype: str | None = None

    def __post_init__(self) -> None:
        if self.dtype is not None:
            object.__setattr__(self, "dtype", dtype_name(self.dtype))
        self._check_choice("dtype", (*HALF_DTYPES, None))
