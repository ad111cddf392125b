"""Attention processors for diffusers' `Attention` layers: each exact, differentiable, and free of graph breaks."""

from __future__ import annotations

from .base import TurboAttnProcessor
from .naive import NaiveAttnProcessor
from .sdpa import SDPAAttnProcessor

__all__ = ["NaiveAttnProcessor", "SDPAAttnProcessor", "TurboAttnProcessor"]
