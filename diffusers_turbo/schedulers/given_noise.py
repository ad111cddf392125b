"""DDIM and the stochastic DPM-Solver++: the host's own step, which takes noise ready made as `variance_noise`."""

from __future__ import annotations

from typing import Any

import torch

from .loop import HostLoop
from .staging import draws_on_host


class DDIMLoop(HostLoop):
    """DDIM; noise is drawn only with eta > 0."""

    def compute(self, name: str, given: dict[str, Any]) -> Any:
        """Draw in host memory what the host would draw there, but send it without waiting."""
        output, generator = given["model_output"], given.get("generator")
        if (
            given.get("eta", 0.0) > 0
            and given.get("variance_noise") is None
            and draws_on_host(generator, output.device)
        ):
            noise = self.staging.noise(output.shape, generator, output.dtype, output.device)
            given = {**given, "generator": None, "variance_noise": noise}
        return super().compute(name, given)


class DPMSolverLoop(HostLoop):
    """DPM-Solver++; noise is drawn only by the variants named sde."""

    only_searches = True

    def compute(self, name: str, given: dict[str, Any]) -> Any:
        """Draw in host memory what the host would draw there, but send it without waiting."""
        output, generator, config = given["model_output"], given.get("generator"), self.scheduler.config
        # a learned variance is cut off the output before noise is drawn: left to the host
        if (
            config.algorithm_type.startswith("sde")
            and not (config.get("variance_type") or "").startswith("learned")
            and given.get("variance_noise") is None
            and draws_on_host(generator, output.device)
        ):
            noise = self.staging.noise(output.shape, generator, torch.float32, output.device)
            given = {**given, "generator": None, "variance_noise": noise}
        return super().compute(name, given)
