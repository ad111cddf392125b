"""Verdicts on the switches that are about memory: VAE slicing, attention slicing, offload, VAE tiling.

They form a ladder of rungs from nothing at all to the thriftiest; the planner takes the first rung whose estimate
fits. Exact rungs come first: tiles are only tried when no exact rung fits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from .conflicts import conflicts_between
from .memory import ENCODER_ROLES, LOOPED_ROLES
from .options import (
    CUDAGraphs,
    GroupOffload,
    MemoryFallback,
    ModelOffload,
    Options,
    PartialOffload,
    SequentialOffload,
    SlicedAttention,
    VAEExactTiling,
    VAESlicing,
    VAETiling,
)
from .request import Situation, Verdict, leave, take
from .timing import moves_weights
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

AMPLE = 0.8
"""Up to this share of the usable memory a plan counts as one with room to spare."""

_SLICE_ATTENTION = SlicedAttention(slice_size="max")


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

    `added_seconds` holds `missed_seconds`, those of the instant tier where the rung does without it, and
    `tiling_seconds`, those of exact tiles.
    """

    rung: Rung
    needed_bytes: int
    added_seconds: float = 0.0
    missed_seconds: float = 0.0
    tiling_seconds: float = 0.0

    @property
    def moving_seconds(self) -> float:
        """What moving weights adds."""
        return self.added_seconds - self.missed_seconds - self.tiling_seconds

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
    scores = (_SLICE_ATTENTION,) if attention_holds_scores and _can_slice_attention(situation) else ()
    offloads = _offload_options(situation)
    exact: list[tuple[Options, ...]] = [()]
    for extra in (slicing, scores):
        if extra:
            exact.append(exact[-1] + extra)
    thrifty = exact[-1]
    ladder = [Rung(lean=False), *(Rung(options=options) for options in exact)]
    moving = (*_wholes(situation), *offloads) if offloads else ()
    ladder += _with_and_without_graphs(thrifty, moving, has_tier=has_tier)
    for exact_tiles in _exact_tiles(situation):
        # what moves the norms' weights one by one leaves it whole
        beside = [option for option in moving if isinstance(option, (ModelOffload, PartialOffload))]
        ladder += [Rung(options=(*thrifty, exact_tiles), lean=lean) for lean in (False, True)]
        ladder += _with_and_without_graphs((*thrifty, exact_tiles), beside, has_tier=has_tier)
    if not situation.request.exact:
        for tile_size in _tile_sizes(situation):
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


def _tile_sizes(situation: Situation) -> tuple[int, ...]:
    vae = situation.pipeline.vae
    if vae is None or not vae.can_tile or vae.tiling:
        return ()
    return tuple(size for size in TILE_SIZES if size < max(situation.height, situation.width))


def _exact_tiles(situation: Situation) -> tuple[VAEExactTiling, ...]:
    vae = situation.pipeline.vae
    if vae is None or not vae.can_tile_exactly or vae.tiling:
        return ()
    return tuple(tiles for tiles in EXACT_TILES if tiles.tile_size < max(situation.height, situation.width))


def _wholes(situation: Situation) -> tuple[Options, ...]:
    """The denoiser there whole, for good or until the VAE comes, everything else by turns."""
    device = _offload_device(situation)
    return tuple(PartialOffload(resident_bytes=None, denoiser_leaves=leaves, device=device) for leaves in (False, True))


def _offload_options(situation: Situation) -> tuple[Options, ...]:
    if offload_trouble(situation):
        return ()
    partial = PartialOffload(denoiser_leaves=True, device=_offload_device(situation))
    # what is there beside the denoiser may be larger than all that has to be of it
    parts = situation.pipeline.components
    texts = tuple(part.name for part in parts if part.role in ENCODER_ROLES)
    others = tuple(part.name for part in parts if part.role not in LOOPED_ROLES)
    alone = [replace(partial, by_layers=names) for names in dict.fromkeys((texts, others)) if names]
    least = replace(alone[-1] if alone else partial, prefetch=False)
    return (*_offloads(situation, partial), *alone, least)


def _offloads(situation: Situation, partial: PartialOffload) -> tuple[Options, ...]:
    streaming, device = situation.device.device_type == "cuda", _offload_device(situation)
    group = GroupOffload(onload_device=device, offload_type="leaf_level", use_stream=streaming, non_blocking=streaming)
    return (ModelOffload(device=device), partial, group, SequentialOffload(device=device))


def _offload_device(situation: Situation) -> str | None:
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


def judge_memory(situation: Situation, tried: Sequence[Estimated], chosen: Estimated) -> list[Verdict]:
    """Return a verdict on each memory switch, given every rung's estimate and the one that was chosen."""
    usable = situation.usable_bytes
    plain = tried[0].needed_bytes
    if usable is None:
        need = "free memory is unknown here, so no memory switch is taken; name a vram_budget to have one"
        return [leave(option, f"{need[0].upper()}{need[1:]}.") for option in _all_kinds(situation)]
    verdicts = []
    for option in _all_kinds(situation):
        taken = next((item for item in chosen.rung.options if type(item) is type(option)), None)
        if taken is not None:
            verdicts.append(take(taken, _why_taken(taken, situation, tried, chosen, usable)))
        elif trouble := _trouble(option, situation):
            verdicts.append(leave(option, trouble))
        elif isinstance(option, SlicedAttention) and not any(item.rung.has(SlicedAttention) for item in tried):
            verdicts.append(leave(option, "Attention holds no score matrix here, so slicing would only slow it down."))
        elif plain <= usable:
            verdicts.append(leave(option, f"Not needed: the peak with margin is {gib(plain)} of {gib(usable)} usable."))
        else:
            verdicts.append(leave(option, _why_left(option, situation, tried, chosen, usable)))
    return verdicts


def judge_fallback(situation: Situation, chosen: Estimated) -> Verdict:
    """Decide on what happens when the estimate was wrong: taken where it is close enough to the limit to matter."""
    device, usable = situation.device, situation.usable_bytes
    # where a plan is of tiles, smaller ones are no new kind of loss
    option = MemoryFallback(allow_tiling=chosen.rung.has(VAETiling))
    if device.device_type != "cuda":
        return leave(option, f"The errors it answers are those of CUDA's allocator; this is {device.name}.")
    if usable is None:
        return leave(option, "Free memory is unknown here: call it yourself, it costs nothing until memory runs out.")
    numbers = f"{gib(chosen.needed_bytes)} with margin of {gib(usable)} usable"
    if chosen.needed_bytes <= AMPLE * usable:
        return leave(option, f"Room enough: {numbers}.")
    smaller = ", at last in smaller tiles" if option.allow_tiling else ""
    return take(
        option, f"Little room is left ({numbers}): a component that runs out of it is called again with less{smaller}."
    )


def _all_kinds(situation: Situation) -> list[Options]:
    sizes = _tile_sizes(situation)
    return [
        _SLICE_ATTENTION,
        VAESlicing(),
        VAEExactTiling(),
        VAETiling(tile_size=sizes[0] if sizes else None),
        *_offloads(situation, PartialOffload(device=_offload_device(situation))),
    ]


def _trouble(option: Options, situation: Situation) -> str | None:
    """Say why a switch is out of the question whatever the memory, None where it is not."""
    facts, vae = situation.pipeline, situation.pipeline.vae
    if moves_weights([option]):
        return offload_trouble(situation)
    if isinstance(option, SlicedAttention):
        if facts.shape.kind != "unet":
            return "It has no effect on a transformer's processors."
        return "It would replace IP-Adapter's processors." if facts.ip_adapter else None
    if vae is None:
        return f"{facts.class_name} has no VAE."
    if isinstance(option, VAESlicing):
        if vae.slicing:
            return "It is on already."
        if not vae.can_slice:
            return f"{vae.class_name} can't decode in slices."
        return "A batch of one picture has nothing to slice." if situation.request.batch_size == 1 else None
    if isinstance(option, VAEExactTiling):
        if not vae.can_tile_exactly:
            return f"This {vae.class_name} is not known to it, or its weights come and go layer by layer."
        if vae.tiling:
            return "The VAE decodes in tiles already."
        if not _exact_tiles(situation):
            return f"A picture of {situation.width}x{situation.height} fits into one tile."
        return None
    if vae.tiling:
        return "It is on already."
    if not vae.can_tile:
        return f"{vae.class_name} can't decode in tiles."
    if not _tile_sizes(situation):
        return f"A picture of {situation.width}x{situation.height} fits into one tile."
    return None


def _why_taken(
    option: Options, situation: Situation, tried: Sequence[Estimated], chosen: Estimated, usable: int
) -> str:
    before = _cheapest_without(option, tried, chosen)
    numbers = f"needs {gib(before)} without it and {gib(chosen.needed_bytes)} with this plan, {gib(usable)} are usable"
    if before <= usable and not chosen.missed_seconds:
        spared = max(item.missed_seconds for item in tried)
        graphs = f"not with CUDA graphs, which spare up to {spared:.1f} s a call"
        numbers = f"would fit without it, but {graphs}; it {numbers}"
    if isinstance(option, VAETiling):
        return f"No exact plan fits: it {numbers}. LOSSY: {VAETiling.lossy_reason}."
    if isinstance(option, VAESlicing):
        return f"The batch of {situation.request.batch_size} is decoded one by one: {numbers}."
    if isinstance(option, SlicedAttention):
        return f"No fused kernel keeps the score matrix out of memory here: {numbers}."
    if isinstance(option, VAEExactTiling):
        where = "pictures between its layers wait in host memory" if option.hold_on == "host" else "pictures stay there"
        work = f"about twice the work of a decode, {_seconds(chosen.tiling_seconds)} at the rates of an H100"
        return f"The untiled picture from tiles; {where}: the pipeline {numbers}. It takes {work}."
    time = _seconds(chosen.moving_seconds)
    seconds = f"up to {time} to a call of {situation.request.steps} steps at the bus rates of an H100"
    if isinstance(option, PartialOffload):
        meanwhile = "leave while other components work" if option.denoiser_leaves else "stay between pictures too"
        if option.resident_bytes is None:
            whole = "leaves while other components work" if option.denoiser_leaves else "stays between pictures too"
            return (
                f"The pipeline {numbers}. The denoiser is there whole while it works and {whole}; text encoders and "
                f"VAE come and go, which adds {seconds}."
            )
        alone = f"; {', '.join(option.alone)} come layer by layer" if option.alone else ""
        hidden = ", less what computing hides" if option.prefetch else ", one group of layers after the other"
        return (
            f"The pipeline {numbers}. {gib(int(option.resident_bytes))} of the denoiser fill the room there is and "
            f"{meanwhile}; the rest is copied at every step, which adds {seconds}{hidden}{alone}."
        )
    return f"The pipeline {numbers}. Moving its weights adds {seconds}."


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 0.1 else f"{1000 * seconds:.0f} ms"


def _cheapest_without(option: Options, tried: Sequence[Estimated], chosen: Estimated) -> int:
    """Return what the plan would need at most just below the rung that brings this switch in."""
    position = tried.index(chosen)
    earlier = [item.needed_bytes for item in tried[:position] if not item.rung.has(type(option))]
    return min(earlier, default=tried[0].needed_bytes)


def _why_left(option: Options, situation: Situation, tried: Sequence[Estimated], chosen: Estimated, usable: int) -> str:
    position = tried.index(chosen)
    with_it = [item for item in tried if item.rung.has(type(option))]
    if not with_it:
        return f"exact=True forbids it: {option.lossy_reason}."
    before = [item for item in tried[:position] if item in with_it]
    if before:
        least = min(before, key=lambda item: item.needed_bytes)
        if least.needed_bytes <= usable:
            call = f"{least.added_seconds:.1f} s to a call of {situation.request.steps} steps"
            more = f"{call} where the plan adds {chosen.added_seconds:.1f}"
            return f"It would fit with {gib(least.needed_bytes)} of {gib(usable)} usable, but adds up to {more}."
        return f"It is not enough: {gib(least.needed_bytes)} with margin of {gib(usable)} usable."
    fits = "fits" if chosen.needed_bytes <= usable else "is the thriftiest there is"
    return f"Not needed: {chosen.rung.name} {fits} with {gib(chosen.needed_bytes)} of {gib(usable)} usable."
