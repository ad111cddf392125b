"""UniPC: the host's own step, with its two updates solved on the host instead of on the device.

Zhao et al., UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models,
https://arxiv.org/abs/2302.04867. Both updates are sums of the sample and of past model outputs; the weights depend on
the noise schedule only. The host builds them from small tensors on the device and solves a linear system there; here
they are numbers, in double precision.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .loop import HostLoop, weighted_sum
from .staging import is_elsewhere


@dataclass(frozen=True)
class Weights:
    """x' = `sample` x + `newest` m_0 + sum_k `older[k]` m_k + `coming` m_t, the last for the corrector only."""

    sample: float
    newest: float
    older: tuple[float, ...]
    coming: float = 0.0


@dataclass(frozen=True)
class Point:
    """One noise level: signal alpha, noise sigma, and half the logarithm of their ratio squared."""

    alpha: float
    sigma: float

    @property
    def log_ratio(self) -> float:
        """lambda = log(alpha / sigma), infinite where no noise is left."""
        return math.log(self.alpha / self.sigma) if self.sigma else math.inf


def point(sigma: float, *, flow: bool) -> Point:
    """Return the noise level of a sigma: of flow matching, or of a variance-preserving process.

    >>> point(0.0, flow=False)
    Point(alpha=1.0, sigma=0.0)
    """
    alpha = 1 - sigma if flow else 1 / math.sqrt(sigma**2 + 1)
    return Point(alpha, sigma if flow else sigma * alpha)


def solve(
    target: Point, start: Point, older: Sequence[Point], *, predict_x0: bool, solver_type: str, corrector: bool
) -> Weights | None:
    """Return the weights of an update from `start` to `target` that knows outputs at `start` and `older` points.

    The order is 1 + len(older). With r_k the position of an older point in units of the step h, and 1 for the new
    point, rho solves sum_k r_k^(n-1) rho_k = n! phi_(n+1)(h) h / B(h) for n = 1, 2, ...; x' is then
    a x - s (e^h - 1) m_0 - s B(h) sum_k rho_k (m_k - m_0) / r_k. None where a number is not finite.
    """
    order, step = 1 + len(older), target.log_ratio - start.log_ratio
    signed = -step if predict_x0 else step
    growth = math.expm1(signed) if signed < 700 else math.inf
    scale = signed if solver_type == "bh1" else growth
    if predict_x0:
        kept, factor = target.sigma / start.sigma, target.alpha
    else:
        kept, factor = target.alpha / start.alpha, target.sigma
    positions = [(place.log_ratio - start.log_ratio) / step for place in older]
    unknowns = [*positions, 1.0] if corrector else positions
    if not unknowns:
        rho = []
    elif len(unknowns) == 1:
        # as the authors have it for the lowest orders, exactly one half
        rho = [0.5]
    elif math.isfinite(step) and step:
        rho = _rho(unknowns, signed, growth, scale)
    else:
        return None
    older_weights = [-factor * scale * rho[k] / positions[k] for k in range(order - 1)]
    coming = -factor * scale * rho[-1] if corrector else 0.0
    newest = -factor * growth - sum(older_weights) - coming
    numbers = (kept, newest, coming, *older_weights)
    return Weights(kept, newest, tuple(older_weights), coming) if all(map(math.isfinite, numbers)) else None


def _rho(positions: Sequence[float], signed: float, growth: float, scale: float) -> list[float]:
    right, factorial = [], 1.0
    phi = growth / signed - 1
    for n in range(1, len(positions) + 1):
        right.append(phi * factorial / scale)
        factorial *= n + 1
        phi = phi / signed - 1 / factorial
    powers = torch.tensor([[place**n for place in positions] for n in range(len(positions))], dtype=torch.float64)
    rho: list[float] = torch.linalg.solve(powers, torch.tensor(right, dtype=torch.float64)).tolist()
    return rho


class UniPCLoop(HostLoop):
    """The host's step with predictor and corrector of our own on devices; its own ones in host memory."""

    only_searches = True
    methods = ("set_timesteps", "step", "multistep_uni_p_bh_update", "multistep_uni_c_bh_update")

    def only_moves(self) -> bool:
        """Tell whether there is no other scheduler inside, which would take its timesteps to the device as well."""
        return self.scheduler.solver_p is None

    def waits(self, sample: Tensor) -> bool:
        """Whether the host's updates would wait: they solve on the sample's device."""
        return is_elsewhere(sample.device) and not is_elsewhere(self.scheduler.sigmas.device)

    def multistep_uni_p_bh_update(self, *args: Any, **kwargs: Any) -> Any:
        """Predict the sample at the next point from the outputs up to this one."""
        sample, order = kwargs.get("sample"), kwargs.get("order")
        if not args and sample is not None and order and self.scheduler.solver_p is None:
            predicted = self.update(sample, self.scheduler.step_index, order)
            if predicted is not None:
                return predicted
        return self.host_method("multistep_uni_p_bh_update")(*args, **kwargs)

    def multistep_uni_c_bh_update(self, *args: Any, **kwargs: Any) -> Any:
        """Correct the sample at this point, now that the model's output there is known."""
        last, order = kwargs.get("last_sample"), kwargs.get("order")
        coming = kwargs.get("this_model_output")
        if not args and last is not None and order and coming is not None:
            corrected = self.update(last, self.scheduler.step_index - 1, order, coming)
            if corrected is not None:
                return corrected
        return self.host_method("multistep_uni_c_bh_update")(*args, **kwargs)

    def update(self, sample: Tensor, index: int, order: int, coming: Tensor | None = None) -> Tensor | None:
        """Go from `sigmas[index]` to the next; None where nothing waits, or the weights are not finite."""
        scheduler, config = self.scheduler, self.scheduler.config
        if not self.waits(sample) or config.solver_type not in ("bh1", "bh2"):
            return None
        flow = bool(config.get("use_flow_sigmas"))
        sigmas = scheduler.sigmas[[index + 1, *(index - k for k in range(order))]].tolist()
        target, start, *older = (point(sigma, flow=flow) for sigma in sigmas)
        weights = solve(
            target,
            start,
            older,
            predict_x0=scheduler.predict_x0,
            solver_type=config.solver_type,
            corrector=coming is not None,
        )
        if weights is None:
            return None
        outputs = [scheduler.model_outputs[-(k + 1)] for k in range(order)]
        terms = [
            (weights.sample, sample),
            (weights.newest, outputs[0]),
            *zip(weights.older, outputs[1:], strict=True),
        ]
        if coming is not None:
            terms.append((weights.coming, coming))
        return weighted_sum(*terms).to(sample.dtype)
