"""What makes a pipeline faster without touching its weights: kernels, the loop, graphs."""

from __future__ import annotations

from dataclasses import dataclass

from ..base import Options

SYNC_FREE_SCHEDULERS = (
    *("DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"),
    *("DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "LCMScheduler", "FlowMatchEulerDiscreteScheduler"),
)

"""Schedulers for which the package has a loop without waiting (`schedulers/registry.py`)."""


@dataclass(frozen=True, kw_only=True)
class FusedKernels(Options):
    """Run GroupNorm with SiLU, GEGLU and residual add with LayerNorm as one Triton kernel each."""

    action = "enable_fused_kernels"
    slot = "kernels"

    group_norm: bool = True
    geglu: bool = True
    add_layer_norm: bool = True

    def __post_init__(self) -> None:
        self._check_flags("group_norm", "geglu", "add_layer_norm")
        if not (self.group_norm or self.geglu or self.add_layer_norm):
            raise self._refuse("group_norm", "at least one of the kernels", "leave one of them on")


@dataclass(frozen=True, kw_only=True)
class SyncFreeLoop(Options):
    """Step the scheduler with timesteps from host memory, so that the host never waits for the GPU in the loop."""

    action = "enable_sync_free_loop"
    slot = "scheduler"


@dataclass(frozen=True, kw_only=True)
class CUDAGraphs(Options):
    """Capture each component's calls as CUDA graphs; `max_graphs` are kept for each, the least recently used goes."""

    action = "enable_cuda_graphs"
    slot = "graphs"

    max_graphs: int = 8

    def __post_init__(self) -> None:
        if self.max_graphs is None:
            raise self._refuse("max_graphs", "a positive integer", "leave max_graphs out for 8")
        self._check_positive("max_graphs")
