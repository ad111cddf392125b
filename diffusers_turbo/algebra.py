"""The switches that reach the same numbers with less work."""

from __future__ import annotations

from .planning import options as opt
from .switching import Switching


class SparesWork(Switching):
    """Part of TurboMixin: what is equal at every step, or in both halves of guidance, is computed once."""

    def enable_prompt_projections(self) -> None:
        """Exact: keys and values of the prompt are projected once a call instead of at every step.

        For the UNet and its ControlNets, with or without graphs and compilation. They take 4 bytes (float16) for each
        token of each sample and channel of each cross-attention layer: 8 MB for SD1.5, 51 MB for SDXL, for one picture
        with guidance; under graphs four times that. A call with `cross_attention_kwargs` projects as ever.

        Raises:
            NotSupportedError: the denoiser is no UNet that hands its prompt to its layers as it comes.
        """
        self._enable(opt.PromptProjections())

    def disable_prompt_projections(self) -> None:
        """Switch `enable_prompt_projections` off."""
        self._disable("enable_prompt_projections")

    def enable_time_projections(self) -> None:
        """Exact: the timesteps of all steps are embedded and projected at once, before the first one.

        The table takes 2 bytes (float16) for each step and output channel of each resnet: 2 MB for 50 steps of SD1.5;
        in SDXL as much for each picture and half of guidance. Timesteps of one's own are embedded as ever.

        Raises:
            NotSupportedError: the denoiser is no UNet whose resnets project a plain time embedding.
        """
        self._enable(opt.TimeProjections())

    def disable_time_projections(self) -> None:
        """Switch `enable_time_projections` off."""
        self._disable("enable_time_projections")

    def enable_shared_guidance(self) -> None:
        """Exact: the UNet's first resnet and first self-attention are computed once for both halves of guidance.

        Raises:
            NotSupportedError: not a pipeline, or a UNet (SDXL), of which the halves are known to be equal there.
        """
        self._enable(opt.SharedGuidance())

    def disable_shared_guidance(self) -> None:
        """Switch `enable_shared_guidance` off."""
        self._disable("enable_shared_guidance")

    def enable_pointwise_matmul(self) -> None:
        """Exact: 1x1 convolutions as matrix products, where activations are channels-last (`enable_channels_last()`).

        Raises:
            NotSupportedError: neither denoiser nor VAE has a 1x1 convolution.
        """
        self._enable(opt.PointwiseMatmul())

    def disable_pointwise_matmul(self) -> None:
        """Switch `enable_pointwise_matmul` off."""
        self._disable("enable_pointwise_matmul")
