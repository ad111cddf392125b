"""Attention processors for diffusers' `Attention` layers: each exact, differentiable, and free of graph breaks."""

from __future__ import annotations

from .base import Tolerance, TurboAttnProcessor
from .limits import AttentionLayer, Limits, layer_kind, read_layer, reasons_against
from .naive import NaiveAttnProcessor
from .registry import PROCESSORS, attention_layers, attention_modules, best_memory_efficient, why_kept
from .sdpa import SDPAAttnProcessor
from .sliced import SlicedAttnProcessor
from .xformers import XFormersAttnProcessor

__all__ = [
    "PROCESSORS",
    "AttentionLayer",
    "Limits",
    "NaiveAttnProcessor",
    "SDPAAttnProcessor",
    "SlicedAttnProcessor",
    "Tolerance",
    "TurboAttnProcessor",
    "XFormersAttnProcessor",
    "attention_layers",
    "attention_modules",
    "best_memory_efficient",
    "layer_kind",
    "read_layer",
    "reasons_against",
    "why_kept",
]
