"""The steps that make room when a component ran out of memory, the least intrusive first: which are there now."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..facts.host import host_memory
from ..facts.pipeline import read_pipeline, upcasts_vae
from ..planning.conflicts import conflicts_between
from ..planning.ladder import EXACT_TILES, TILE_SIZES, slices_of
from ..planning.memory import holds_scores, looped_names
from ..planning.options import (
    SLICED_DENOISERS,
    CUDAGraphs,
    DenoiserSlicing,
    GroupOffload,
    ModelOffload,
    NaiveAttention,
    Options,
    PartialOffload,
    SDPAAttention,
    SequentialOffload,
    SlicedAttention,
    VAEExactTiling,
    VAESlicing,
    VAETiling,
    VAEUpcastCopy,
)
from ..tiling.hosts import decodes_in_exact_tiles
from .components import modules_of
from .ledger import Ledger
from .streaming import weights_of

HOLD_MEMORY = (CUDAGraphs, VAEUpcastCopy)
"""Switches for speed that hold memory of their own: pools of graphs, copies of weights."""

LEAST_SHARE = 8
"""What stays of a denoiser is halved down to this part of it, and is then nothing."""


@dataclass(frozen=True)
class Step:
    """What to switch on (if anything) and which switches have to make way for it; `alone`: not beside another call."""

    options: Options | None
    off: tuple[Options, ...] = ()
    alone: bool = True

    def __str__(self) -> str:
        on = [] if self.options is None else [_call(self.options)]
        off = [f"{options.action}() off" for options in self.off]
        return ", ".join(on + off)


def steps(
    pipe: Any, ledger: Ledger, component: str, batch_size: int, samples: int, side: int, *, tiling: bool
) -> Iterator[Step]:
    """Iterate over the steps that are left for a component, as the pipeline stands.

    Args:
        pipe: the pipeline, in the middle of a call.
        ledger: its switches.
        component: the attribute that holds what ran out of memory.
        batch_size: pictures in that call.
        samples: rows of what it was given, of which guidance has two for a picture.
        side: the picture's longer side in pixels, 0 when unknown.
        tiling: whether the VAE may be tiled at last, which is lossy.
    """
    holding = tuple(lever.options for lever in ledger.levers() if type(lever.options) in HOLD_MEMORY)
    if holding:
        yield Step(None, off=holding)
    vae = modules_of(pipe).get("vae") if component == "vae" else None
    if vae is not None and batch_size > 1 and hasattr(vae, "enable_slicing") and not getattr(vae, "use_slicing", True):
        yield _step(ledger, VAESlicing(), alone=False)
    for exact_tiles in _exact_tiles(vae, ledger):
        if side > exact_tiles.tile_size:
            yield _step(ledger, exact_tiles, alone=False)
    if component == "unet" and _holds_scores(pipe, ledger):
        yield _step(ledger, SlicedAttention(slice_size="max"))
    for slices in _slices(pipe, ledger, component, samples):
        yield _step(ledger, slices)
    for offload in _offloads(pipe, ledger, component):
        yield _step(ledger, offload)
    if tiling and vae is not None and hasattr(vae, "enable_tiling"):
        lossy = getattr(vae, "use_tiling", False) and not _in_exact_tiles(ledger)
        now = getattr(vae, "tile_sample_min_size", 0) if lossy else side
        for size in TILE_SIZES:
            if size < min(now, side):
                yield _step(ledger, VAETiling(tile_size=size), alone=False)


def _slices(pipe: Any, ledger: Ledger, component: str, samples: int) -> Iterator[DenoiserSlicing]:
    """Iterate over slices of the denoiser's batch that are smaller than those it works in."""
    facts = read_pipeline(pipe)
    if component not in looped_names(facts) or facts.shape.class_name not in SLICED_DENOISERS:
        return
    lever = ledger.top(DenoiserSlicing.slot)
    now = lever.options.slice_size if lever is not None and isinstance(lever.options, DenoiserSlicing) else samples
    yield from (slices for slices in slices_of(samples) if slices.slice_size < now)


def _exact_tiles(vae: Any, ledger: Ledger) -> Iterator[VAEExactTiling]:
    """Iterate over the exact tiles that hold less of the VAE's pictures on the device than what is on."""
    now = _in_exact_tiles(ledger)
    if vae is None or not decodes_in_exact_tiles(vae) or (now is None and vae.use_tiling):
        return
    for options in EXACT_TILES:
        if now is None or _thrift(options) > _thrift(now):
            yield options


def _thrift(tiles: VAEExactTiling) -> tuple[bool, int]:
    """The greater, the less is held on the device."""
    return tiles.hold_on == "host", -tiles.tile_size


def _in_exact_tiles(ledger: Ledger) -> VAEExactTiling | None:
    lever = ledger.top(VAEExactTiling.slot)
    return lever.options if lever is not None and isinstance(lever.options, VAEExactTiling) else None


def _step(ledger: Ledger, options: Options, *, alone: bool = True) -> Step:
    levers = [lever.options for lever in ledger.levers() if lever.options.slot != options.slot]
    off = tuple(other for other in levers if conflicts_between(options, other))
    return Step(options, off=off, alone=alone or bool(off))


def _holds_scores(pipe: Any, ledger: Ledger) -> bool:
    top = ledger.top("attention")
    facts = read_pipeline(pipe)
    if facts.ip_adapter or facts.shape.kind != "unet":
        return False
    if top is not None and isinstance(top.options, SDPAAttention):
        return top.options.backend == "math"
    return isinstance(top.options, NaiveAttention) if top is not None else holds_scores(facts.processors)


def _offloads(pipe: Any, ledger: Ledger, component: str) -> Iterator[Options]:
    """Iterate over what keeps less on the device than the offload in force while a component works, the fastest first.

    Where exact tiles are on, group and sequential offload are none of it: hooks that move the norms' weights one by one
    leave nothing of the tiles, and the decode would run out of memory instead. Partial offload moves none of these.
    """
    lever = ledger.top("offload")
    now = lever.options if lever is not None else None
    if now is None and not _room_in_host_memory(pipe):
        return
    device = getattr(now, "device", None) or getattr(now, "onload_device", None) or str(pipe._execution_device)
    if now is None:
        yield ModelOffload(device=device)
    if vae_is_cast(pipe):
        return  # hooks that hold the VAE's tensors would not notice that it is cast back after the decode
    by_hooks = isinstance(now, (GroupOffload, SequentialOffload))
    in_exact_tiles = _in_exact_tiles(ledger) is not None
    if isinstance(now, PartialOffload):
        yield from _leaner(pipe, now, component)
    elif in_exact_tiles and not by_hooks:
        yield from _leaner(pipe, PartialOffload(resident_bytes=None, denoiser_leaves=True, device=device), component)
    if in_exact_tiles and (component == "vae" or not by_hooks):
        return
    streaming = torch.device(device).type == "cuda"
    group = now if isinstance(now, GroupOffload) else GroupOffload(onload_device=device)
    group = replace(group, use_stream=streaming, non_blocking=streaming, num_blocks_per_group=None)
    if not isinstance(now, (GroupOffload, SequentialOffload)):
        yield group
    if not isinstance(now, SequentialOffload) and getattr(now, "offload_type", None) != "leaf_level":
        yield replace(group, offload_type="leaf_level")
    if not isinstance(now, SequentialOffload) and streaming:
        yield SequentialOffload(device=device)


def _leaner(pipe: Any, now: PartialOffload, component: str) -> Iterator[PartialOffload]:
    """Iterate over partial offloads that keep less on the device than `now` while a component works.

    Less of the denoiser each time, of the others their layers one by one.
    """
    looped = looped_names(read_pipeline(pipe))
    if component not in looped:
        if now.resident_bytes != 0 and not now.denoiser_leaves:
            now = replace(now, denoiser_leaves=True)
            yield now
        if component not in now.alone:
            yield replace(now, by_layers=(*now.alone, component))
        return
    modules = modules_of(pipe)
    whole = sum(weight.nbytes for name in looped for weight in weights_of(modules[name]))
    while stays := now.stays(whole):
        now = replace(now, resident_bytes=stays // 2 if stays > whole // LEAST_SHARE else 0)
        yield now
    if now.prefetch:
        yield replace(now, prefetch=False)


def vae_is_cast(pipe: Any) -> bool:
    """Whether the pipeline has its VAE in float32 just now, for a decode only."""
    modules = modules_of(pipe)
    vae = modules.get("vae")
    denoiser = next((modules[name] for name in ("unet", "transformer") if name in modules), None)
    if vae is None or denoiser is None or not upcasts_vae(pipe):
        return False
    return next(vae.parameters()).dtype == torch.float32 != next(denoiser.parameters()).dtype


def _room_in_host_memory(pipe: Any) -> bool:
    available = host_memory()[1]
    weights = [weight for module in modules_of(pipe).values() for weight in module.parameters()]
    return not available or sum(weight.nbytes for weight in weights if weight.device.type != "cpu") < available


def _call(options: Options) -> str:
    defaults = type(options)().as_dict()
    given = [f"{name}={value!r}" for name, value in options.as_dict().items() if value != defaults[name]]
    return f"{options.action}({', '.join(given)})"
