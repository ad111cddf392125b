"""Latent consistency models: a step of our own where the host's would wait for its noise to be copied.

Luo et al., Latent Consistency Models, https://arxiv.org/abs/2310.04378, multistep sampling (algorithm 3).
"""

from __future__ import annotations

import math
from typing import Any

import torch

from .loop import HostLoop, weighted_sum
from .staging import draws_on_host, is_elsewhere

PREDICTIONS = ("epsilon", "sample", "v_prediction")


class LCMLoop(HostLoop):
    """The host's step, or ours when noise comes from a generator in host memory."""

    methods = ("set_timesteps", "step", "add_noise")

    def __init__(self, scheduler: Any) -> None:
        super().__init__(scheduler)
        self.moved: Any = None
        self.table: Any = None

    def add_noise(self, *args: Any, **kwargs: Any) -> Any:
        """Keep the table of alphas in reach, which the host's own method leaves on the device from then on."""
        before = self.alphas()
        noisy = self.host_method("add_noise")(*args, **kwargs)
        self.moved, self.table = self.scheduler.alphas_cumprod, before
        return noisy

    def alphas(self) -> Any:
        """Return the table of alphas in host memory; read from a device it is read once."""
        table = self.scheduler.alphas_cumprod
        if not is_elsewhere(table.device):
            return table
        if self.moved is not table:
            self.moved, self.table = table, table.cpu()
        return self.table

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        """Read before the loop what would have to be read in it."""
        super().set_timesteps(*args, **kwargs)
        self.alphas()

    def compute(self, name: str, given: dict[str, Any]) -> Any:
        """Step by our formula where the host's would wait, for the configurations it knows."""
        config = self.scheduler.config
        ours = (
            draws_on_host(given.get("generator"), given["model_output"].device)
            and config.prediction_type in PREDICTIONS
            and not config.thresholding
            and self.scheduler.num_inference_steps is not None
        )
        return self.consistency_step(**given) if ours else super().compute(name, given)

    def consistency_step(
        self, model_output: Any, timestep: Any, sample: Any, generator: Any = None, return_dict: bool = True
    ) -> Any:
        """Predict the clean sample, keep c_skip of the noisy one, and noise it again for the next timestep.

        denoised = c_out x0 + c_skip x;  x' = sqrt(a') denoised + sqrt(1 - a') n, and in the last step just denoised.
        """
        scheduler, config = self.scheduler, self.scheduler.config
        if scheduler.step_index is None:
            scheduler._init_step_index(timestep)
        index, timesteps = scheduler.step_index, scheduler.timesteps
        c_skip, c_out = map(float, scheduler.get_scalings_for_boundary_condition_discrete(timestep))
        alpha = self.alpha(timestep)
        signal, spread = math.sqrt(alpha), math.sqrt(1 - alpha)
        if config.prediction_type == "epsilon":
            clean = weighted_sum((1 / signal, sample), (-spread / signal, model_output))
        elif config.prediction_type == "v_prediction":
            clean = weighted_sum((signal, sample), (-spread, model_output))
        else:
            clean = model_output
        if config.clip_sample:
            clean = clean.clamp(-config.clip_sample_range, config.clip_sample_range)
        wide = weighted_sum((c_out, clean), (c_skip, sample))
        dtype = torch.promote_types(sample.dtype, model_output.dtype)
        denoised = wide.to(dtype)
        previous = denoised
        if index != scheduler.num_inference_steps - 1:
            following = timesteps[index + 1] if index + 1 < len(timesteps) else timestep
            alpha_next = self.alpha(following)
            noise = self.staging.noise(model_output.shape, generator, denoised.dtype, model_output.device)
            previous = weighted_sum((math.sqrt(alpha_next), wide), (math.sqrt(1 - alpha_next), noise)).to(dtype)
        scheduler._step_index += 1
        if not return_dict:
            return previous, denoised
        from diffusers.schedulers.scheduling_lcm import LCMSchedulerOutput

        return LCMSchedulerOutput(prev_sample=previous, denoised=denoised)

    def alpha(self, timestep: Any) -> float:
        """Return the cumulative product of alphas at a timestep in host memory."""
        return float(self.alphas()[timestep] if timestep >= 0 else self.scheduler.final_alpha_cumprod)
