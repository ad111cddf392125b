"""The hand-made ways of `simulated_cards.py`: what diffusers itself can switch on, and other packages that offload."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from simulated_cards_tables import RESIDENT, Row

from diffusers_turbo.bench.peers import PEERS


def _resident(pipe: Any) -> None:
    pipe.to("cuda")


def _model(pipe: Any) -> None:
    pipe.enable_model_cpu_offload(device="cuda")  # named, since diffusers remembers that the process before had no GPU


def _sequential(pipe: Any) -> None:
    pipe.enable_sequential_cpu_offload(device="cuda")


def _blocks(pipe: Any) -> None:
    pipe.enable_group_offload(torch.device("cuda"), offload_type="block_level", num_blocks_per_group=1)


def _leaves(pipe: Any) -> None:
    pipe.enable_group_offload(torch.device("cuda"), offload_type="leaf_level", use_stream=True)


def _tiled(offload: Callable[[Any], None]) -> Callable[[Any], None]:
    def both(pipe: Any) -> None:
        pipe.vae.enable_tiling()
        offload(pipe)

    return both


SEQUENTIAL = "sequential offload"
PLACES = {
    RESIDENT: _resident,
    "model offload": _model,
    "block offload": _blocks,
    "leaf offload": _leaves,
    SEQUENTIAL: _sequential,
}
RIVALS: dict[str, Callable[[Any], None]] = {
    **PLACES,
    **{f"{name}, tiles": _tiled(place) for name, place in PLACES.items()},
}
"""What a user of diffusers alone can switch on, by name."""

THRIFTIEST = (SEQUENTIAL, f"{SEQUENTIAL}, tiles")

OFFLOADERS = {name: peer for name, peer in PEERS.items() if peer.offloads}
"""Packages that offload, by name. They go by the memory there is: their peaks uncapped say little of small cards."""

HAND_MADE = (*RIVALS, *OFFLOADERS)


def use_offloader(pipe: Any, name: str, cap: int | None) -> Row:
    """Throw another package on a pipeline in host memory, and return what it was told and what it chose.

    One without a setting for the memory it may take asks PyTorch how much there is: see `as_card`.
    """
    peer = OFFLOADERS[name]
    told = cap if peer.takes_budget else None
    peer.apply(pipe, device=torch.device("cuda" if torch.cuda.is_available() else "cpu"), budget_bytes=told)
    chosen = getattr(getattr(pipe, "mm", None), "applied_strategy", None)  # of diffusers-mm's manager
    return {"version": peer.installed_version(), "told_bytes": told, "strategy": chosen}
