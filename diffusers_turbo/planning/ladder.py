"""The ladder of memory switches: rungs from nothing at all to the thriftiest, and which of those that fit is taken.

Exact rungs come first: lossy tiles are only tried when no exact rung fits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from .conflicts import conflicts_between
from .memory import ENCODER_ROLES, LOOPED_ROLES, held_pictures, works_in_float32
from .options import (
    SLICED_DENOISERS,
    CUDAGraphs,
    DenoiserSlicing,
    GroupOffload,
    ModelOffload,
    Options,
    PartialOffload,
    SequentialOffload,
    SlicedAttention,
    VAEExactTiling,
    VAESlicing,
    VAETiling,
)
from .request import Situation
from .units import gib

TILE_SIZES = (512, 256)
"""Sides of tiles in pixels, the larger first: fewer borders. 256 is the smallest at which the KL autoencoder's group
norms still see a picture's worth of context; stock tiling uses the model's own 512 or 1024."""

EXACT_TILES = (
    VAEExactTiling(),
    VAEExactTiling(hold_on="host"),
    VAEExactTiling(tile_size=128, hold_on="host"),
)
"""Tiles that give the untiled picture, each with less on the device than the one before: half as large ones take a
quarter of the room, until a picture at the latents' resolution takes more, and more of each tile is not its own."""

SLICES = (8, 2, 1)
"""About so many of a batch's samples the denoiser works on at a time, the least intrusive first."""

SLICE_ATTENTION = SlicedAttention(slice_size="max")


@dataclass(frozen=True, kw_only=True)
class Rung:
    """One combination of memory switches; a lean one also does without copies of weights for speed."""

    options: tuple[Options, ...] = ()
    lean: bool = True

    def has(self, kind: type[Options]) -> bool:
        """Whether the rung has a switch of this kind."""
        return any(isinstance(option, kind) for option in self.options)

    @property
    def borders(self) -> float:
        """How many borders between tiles cross a picture, by the measure of the smallest tile; 0 without tiles."""
        sizes = [option.tile_size for option in self.options if isinstance(option, VAETiling)]
        return max((TILE_SIZES[-1] / size for size in sizes if size), default=0.0)

    @property
    def fineness(self) -> int:
        """How far it goes in exact tiles; 0 without."""
        return next((1 + place for place, tiles in enumerate(EXACT_TILES) if tiles in self.options), 0)

    @property
    def slice_size(self) -> int | None:
        """How many samples the denoiser works on at a time; None: all there are."""
        return next((option.slice_size for option in self.options if isinstance(option, DenoiserSlicing)), None)

    @property
    def stints(self) -> bool:
        """Whether partial offload does without what takes room: components that come whole, or prefetching."""
        offloads = [option for option in self.options if isinstance(option, PartialOffload)]
        return any(bool(option.alone) or not option.prefetch for option in offloads)

    @property
    def crawls(self) -> bool:
        """Whether the denoiser waits for its weights, which are not copied ahead."""
        waits = any(isinstance(option, PartialOffload) and not option.prefetch for option in self.options)
        return waits or self.has(GroupOffload) or self.has(SequentialOffload)

    @property
    def streams(self) -> bool:
        """Whether part of the denoiser may stay while the rest is streamed."""
        return any(isinstance(option, PartialOffload) and not option.keeps_all for option in self.options)

    def keeping(self, resident_bytes: int, *, denoiser_leaves: bool) -> Rung:
        """The rung with this much of the denoiser staying under partial offload."""
        return replace(
            self,
            options=tuple(
                replace(option, resident_bytes=resident_bytes, denoiser_leaves=denoiser_leaves)
                if isinstance(option, PartialOffload)
                else option
                for option in self.options
            ),
        )

    @property
    def exact(self) -> bool:
        """Whether its switches leave the picture as it is, up to rounding."""
        return all(option.exact for option in self.options)

    @property
    def name(self) -> str:
        """The rung's switches by their methods' names."""
        return " + ".join(option.action for option in self.options) or "doing without copies of weights"


@dataclass(frozen=True, kw_only=True)
class Estimated:
    """A rung with what it is estimated to need, margin included, and what it adds to a call's time at most.

    `added_seconds` holds `missed_seconds`, those of the instant tier where the rung does without it,
    `tiling_seconds`, those of exact tiles, and `slicing_seconds`, those of more calls of the denoiser.
    """

    rung: Rung
    needed_bytes: int
    added_seconds: float = 0.0
    missed_seconds: float = 0.0
    tiling_seconds: float = 0.0
    slicing_seconds: float = 0.0

    @property
    def moving_seconds(self) -> float:
        """What moving weights adds."""
        return self.added_seconds - self.missed_seconds - self.tiling_seconds - self.slicing_seconds

    @property
    def exact(self) -> bool:
        """Whether the rung is."""
        return self.rung.exact


def cheapest(tried: Sequence[Estimated], usable_bytes: int | None) -> Estimated:
    """Choose the rung that fits and adds the least time, the first of equals; a lossy one only if no exact one fits.

    Of lossy ones that take at most twice the least time, the one with the largest tiles: they are nearest to the
    untiled picture. The thriftiest where none fits, and the first where it is not known what is usable.
    """
    if usable_bytes is None:
        return tried[0]
    fitting = [item for item in tried if item.needed_bytes <= usable_bytes]
    if not fitting:
        return min(tried, key=lambda item: item.needed_bytes)
    among = [item for item in fitting if item.exact] or fitting
    least = min(item.added_seconds for item in among)
    return min(
        (item for item in among if item.added_seconds <= 2 * least),
        key=lambda item: (item.rung.borders, item.added_seconds),
    )


def make_ladder(situation: Situation, *, attention_holds_scores: bool, has_tier: bool) -> list[Rung]:
    """Return the rungs for this pipeline, device and request, the least intrusive first.

    A denoiser that is there whole while it works can be of the instant tier, where the plan `has_tier`.
    """
    slicing = _slicing_options(situation)
    scores = (SLICE_ATTENTION,) if attention_holds_scores and _can_slice_attention(situation) else ()
    offloads = _offload_options(situation)
    exact: list[tuple[Options, ...]] = [()]
    for extra in (slicing, scores):
        if extra:
            exact.append(exact[-1] + extra)
    ladder = [Rung(lean=False), *(Rung(options=options) for options in exact)]
    moving = (*_wholes(situation), *offloads) if offloads else ()
    bases = [exact[-1], *((*exact[-1], slices) for slices in denoiser_slices(situation))]
    for thrifty in bases:
        if thrifty is not bases[0]:
            ladder += [Rung(options=thrifty, lean=lean) for lean in (False, True)]
        ladder += _with_and_without_graphs(thrifty, moving, has_tier=has_tier)
        for exact_tiles in exact_tiles_of(situation):
            # what moves the norms' weights one by one leaves it whole
            beside = [option for option in moving if isinstance(option, (ModelOffload, PartialOffload))]
            ladder += [Rung(options=(*thrifty, exact_tiles), lean=lean) for lean in (False, True)]
            ladder += _with_and_without_graphs((*thrifty, exact_tiles), beside, has_tier=has_tier)
    if not situation.request.exact:
        for tile_size in tile_sizes(situation):
            for thrifty in (bases[0], *bases[:0:-1][:1]):
                tiled = (*thrifty, VAETiling(tile_size=tile_size))
                ladder.append(Rung(options=tiled))
                ladder += _with_and_without_graphs(tiled, moving, has_tier=has_tier)
    return ladder


def _with_and_without_graphs(
    beside: tuple[Options, ...], offloads: Sequence[Options], *, has_tier: bool
) -> Iterator[Rung]:
    for offload in offloads:
        if has_tier and not conflicts_between(CUDAGraphs(), offload):
            yield Rung(options=(*beside, offload), lean=False)
        yield Rung(options=(*beside, offload))


def _slicing_options(situation: Situation) -> tuple[Options, ...]:
    vae = situation.pipeline.vae
    usable = vae is not None and vae.can_slice and not vae.slicing and situation.request.batch_size > 1
    return (VAESlicing(),) if usable else ()


def _can_slice_attention(situation: Situation) -> bool:
    return situation.pipeline.shape.kind == "unet" and not situation.pipeline.ip_adapter


def denoiser_slices(situation: Situation) -> tuple[DenoiserSlicing, ...]:
    """Return the slices that the denoiser's batch can be cut into evenly, the largest first."""
    known = situation.pipeline.shape.class_name in SLICED_DENOISERS
    return slices_of(situation.samples) if known else ()


def slices_of(samples: int) -> tuple[DenoiserSlicing, ...]:
    """Return the slices that so many samples can be cut into evenly, the largest first.

    >>> [slices.slice_size for slices in slices_of(12)]
    [6, 2, 1]
    """
    even = [size for size in range(1, samples) if samples % size == 0]
    sizes = dict.fromkeys(max(size for size in even if size <= most) for most in SLICES if even)
    return tuple(DenoiserSlicing(slice_size=size) for size in sizes)


def tile_sizes(situation: Situation) -> tuple[int, ...]:
    """Return the sides of lossy tiles that a picture can be cut into, the larger first."""
    vae = situation.pipeline.vae
    if vae is None or not vae.can_tile or vae.tiling:
        return ()
    return tuple(size for size in TILE_SIZES if size < max(situation.height, situation.width))


def exact_tiles_of(situation: Situation) -> tuple[VAEExactTiling, ...]:
    """Return the exact tiles that a picture can be cut into here, the ones that hold most on the device first."""
    vae = situation.pipeline.vae
    if vae is None or not vae.can_tile_exactly or vae.tiling:
        return ()
    facts, room = situation.pipeline, situation.device.host_ram_bytes
    held = held_pictures(facts, situation.height, situation.width, 4 if works_in_float32(facts) else 2)
    # where device and host share their memory nothing is gained, and half of it is for other pages
    on_host = situation.device.device_type == "cuda" and (not room or held <= room // 2)
    side = max(situation.height, situation.width)
    return tuple(tiles for tiles in EXACT_TILES if tiles.tile_size < side and (on_host or tiles.hold_on != "host"))


def _wholes(situation: Situation) -> tuple[Options, ...]:
    """The denoiser there whole, for good or until the VAE comes, everything else by turns."""
    device = offload_device(situation)
    return tuple(PartialOffload(resident_bytes=None, denoiser_leaves=leaves, device=device) for leaves in (False, True))


def _offload_options(situation: Situation) -> tuple[Options, ...]:
    if offload_trouble(situation):
        return ()
    partial = PartialOffload(denoiser_leaves=True, device=offload_device(situation))
    # what is there beside the denoiser may be larger than all that has to be of it
    parts = situation.pipeline.components
    texts = tuple(part.name for part in parts if part.role in ENCODER_ROLES)
    others = tuple(part.name for part in parts if part.role not in LOOPED_ROLES)
    alone = [replace(partial, by_layers=names) for names in dict.fromkeys((texts, others)) if names]
    least = replace(alone[-1] if alone else partial, prefetch=False)
    return (*all_offloads(situation, partial), *alone, least)


def all_offloads(situation: Situation, partial: PartialOffload) -> tuple[Options, ...]:
    """Return one of each kind of offload, the fastest of those that make the room first."""
    streaming, device = situation.device.device_type == "cuda", offload_device(situation)
    group = GroupOffload(onload_device=device, offload_type="leaf_level", use_stream=streaming, non_blocking=streaming)
    return (ModelOffload(device=device), partial, group, SequentialOffload(device=device))


def offload_device(situation: Situation) -> str | None:
    """Return the device for offload to work on, None where it is the first one, which offload takes by itself."""
    name = situation.device.device
    return None if name.partition(":")[2] in ("", "0") else name


def offload_trouble(situation: Situation) -> str | None:
    """Say why no offload can be used at all, None where it can."""
    facts, device = situation.pipeline, situation.device
    if device.device_type in ("cpu", "mps"):
        return f"{device.name} computes in the memory that offload would move weights to."
    if facts.hooks:
        return f"The pipeline is offloaded already ({', '.join(facts.hooks)})."
    if facts.refusals:
        return f"{'; '.join(facts.refusals)}, so its weights can't be moved freely."
    coming = sum(part.parameter_bytes for part in facts.components if part.devices != ("cpu",))
    if device.host_ram_bytes and coming > device.host_ram_bytes:
        return f"The weights ({gib(coming)}) exceed free host memory ({gib(device.host_ram_bytes)})."
    return None
