"""Which kernels there are; tests and benchmarks run over this."""

from __future__ import annotations

from collections.abc import Mapping

from .add_layer_norm import KERNEL as ADD_LAYER_NORM
from .base import Kernel
from .bias_residual import KERNEL as BIAS_RESIDUAL
from .geglu import KERNEL as GEGLU
from .group_norm import KERNEL as GROUP_NORM
from .linear_geglu import KERNEL as LINEAR_GEGLU
from .upsample_conv import KERNEL as UPSAMPLE_CONV

KERNELS: Mapping[str, Kernel] = {
    "group_norm": GROUP_NORM,
    "geglu": GEGLU,
    "linear_geglu": LINEAR_GEGLU,
    "add_layer_norm": ADD_LAYER_NORM,
    "bias_residual": BIAS_RESIDUAL,
    "upsample_conv": UPSAMPLE_CONV,
}
