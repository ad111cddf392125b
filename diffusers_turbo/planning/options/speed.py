"""What makes a pipeline faster without touching its weights: less work for the host, less work at all."""

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
    """Run GroupNorm with SiLU, GEGLU with its projection, add with LayerNorm, bias with residual as a kernel each.

    And upsampling with the convolution after it as one of the small picture.
    """

    action = "enable_fused_kernels"
    slot = "kernels"

    group_norm: bool = True
    geglu: bool = True
    linear_geglu: bool = True
    add_layer_norm: bool = True
    bias_residual: bool = True
    upsample_conv: bool = True

    def __post_init__(self) -> None:
        self._check_flags(*self.as_dict())
        if not any(self.as_dict().values()):
            raise self._refuse("group_norm", "at least one of the kernels", "leave one of them on")


DOUBLING_PIPELINES = (
    *("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"),
    *("StableDiffusionControlNetPipeline", "StableDiffusionControlNetImg2ImgPipeline"),
    "StableDiffusionControlNetInpaintPipeline",
)
"""Pipelines whose UNet input is two equal halves under guidance (`tests/algebra/test_guidance.py` looks at it)."""


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


@dataclass(frozen=True, kw_only=True)
class PointwiseMatmul(Options):
    """Run 1x1 convolutions as matrix products, on channels-last activations."""

    action = "enable_pointwise_matmul"
    slot = "pointwise"


@dataclass(frozen=True, kw_only=True)
class PromptProjections(Options):
    """Project keys and values of the prompt once a call instead of at every step."""

    action = "enable_prompt_projections"
    slot = "prompt"


@dataclass(frozen=True, kw_only=True)
class TimeProjections(Options):
    """Embed and project the timesteps of all steps at once, before the first one."""

    action = "enable_time_projections"
    slot = "time"


@dataclass(frozen=True, kw_only=True)
class SharedGuidance(Options):
    """Compute the part of the UNet before the first cross-attention once for both halves of guidance."""

    action = "enable_shared_guidance"
    slot = "guidance"


@dataclass(frozen=True, kw_only=True)
class VAEUpcastCopy(Options):
    """Keep a float32 copy of the VAE's weights, for pipelines that decode in float32."""

    action = "enable_vae_upcast_copy"
    slot = "vae_upcast"
