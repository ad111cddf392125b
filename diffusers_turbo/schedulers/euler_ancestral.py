"""Euler with ancestral noise: a step of our own where the host's would wait for its noise to be copied.

Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models, https://arxiv.org/abs/2206.00364
(variance-exploding form); sigma splits into a part reached by the ODE and a part of fresh noise.
"""

from __future__ import annotations

import math
from typing import Any

from .loop import ScalingLoop, weighted_sum
from .staging import draws_on_host

PREDICTIONS = ("epsilon", "v_prediction")


class EulerAncestralLoop(ScalingLoop):
    """The host's step, or ours when noise comes from a generator in host memory."""

    def compute(self, name: str, given: dict[str, Any]) -> Any:
        """Step by our formula where the host's would wait, for the predictions it knows."""
        scheduler = self.scheduler
        ours = (
            name == "step"
            and draws_on_host(given.get("generator"), given["model_output"].device)
            and scheduler.config.prediction_type in PREDICTIONS
            # the host warns of it, and goes on
            and scheduler.is_scale_input_called
        )
        return self.ancestral_step(**given) if ours else super().compute(name, given)

    def ancestral_step(
        self, model_output: Any, timestep: Any, sample: Any, generator: Any = None, return_dict: bool = True
    ) -> Any:
        """Step from sigma to sigma_down along the derivative d, then add sigma_up of noise.

        x' = x + (sigma_down - sigma) d + sigma_up n, with d = eps, and for v-prediction
        d = x sigma / (sigma^2 + 1) + v / sqrt(sigma^2 + 1).
        """
        scheduler = self.scheduler
        if scheduler.step_index is None:
            scheduler._init_step_index(timestep)
        index = scheduler.step_index
        sigma, sigma_next = scheduler.sigmas[index].item(), scheduler.sigmas[index + 1].item()
        sigma_up = sigma_next * math.sqrt(max(0.0, 1 - (sigma_next / sigma) ** 2))
        sigma_down = sigma_next**2 / sigma
        by = sigma_down - sigma
        noise = self.staging.noise(model_output.shape, generator, model_output.dtype, model_output.device)
        if scheduler.config.prediction_type == "epsilon":
            original = weighted_sum((1.0, sample), (-sigma, model_output))
            previous = weighted_sum((1.0, sample), (by, model_output), (sigma_up, noise))
        else:
            scale = sigma**2 + 1
            original = weighted_sum((1 / scale, sample), (-sigma / math.sqrt(scale), model_output))
            previous = weighted_sum(
                (1 + by * sigma / scale, sample), (by / math.sqrt(scale), model_output), (sigma_up, noise)
            )
        previous = previous.to(model_output.dtype)
        scheduler._step_index += 1
        if not return_dict:
            return previous, original
        from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteSchedulerOutput

        return EulerAncestralDiscreteSchedulerOutput(prev_sample=previous, pred_original_sample=original)
