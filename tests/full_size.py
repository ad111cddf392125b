"""Full-size pipelines with random weights, text encoders included: what a GPU test runs, made from config."""

from __future__ import annotations

from typing import Any

import torch

from tests.planning.architectures import measured


def build(name: str, dtype: torch.dtype = torch.float16, device: str = "cuda") -> Any:
    """Make an architecture of the bench with seed 0, with DDIM."""
    return measured(name, dtype, device, text_encoders=True)
