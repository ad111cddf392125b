"""Which weights lie on the device when: for a pipeline as it is and under each offload."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from ..planning.options import GroupOffload, ModelOffload, Options, PartialOffload, SequentialOffload
from ..planning.residents import SMALL_BYTES, aligned, choose_streamed, join_neighbours, window_sizes
from .allocator import DEFAULT_POOL, Allocator, Block
from .recording import Entered, Event

STREAM_POOL = -1
"""Weights that a side stream fetches are allocated in its own pool."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Weights that come and go together: when `first` begins, until `last` ends. `owners` are paths of modules."""

    first: str
    last: str
    owners: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The weights of a pipeline by the module that owns them, each storage once, and how offload may group them.

    Attributes:
        sizes: path of the owning module -> bytes of its own storages, component by component in the pipeline's order.
        order: the components.
        sequence: the order in which model offload sends components away.
        always: components that offload leaves on the device.
        blocks: module -> its lists of blocks, as block-level offload finds them.
    """

    sizes: Mapping[str, tuple[int, ...]]
    order: tuple[str, ...]
    sequence: tuple[str, ...] = ()
    always: tuple[str, ...] = ()
    blocks: Mapping[str, tuple[tuple[str, ...], ...]] = field(default_factory=dict)

    def owners(self, path: str) -> tuple[str, ...]:
        """The modules with weights at and below a path."""
        return tuple(name for name in self.sizes if name == path or name.startswith(f"{path}."))

    def widened(self, component: str) -> Weights:
        """The same with one component's weights at twice their width."""
        own = self.owners(component)
        sizes = {name: tuple(2 * size for size in sizes) for name, sizes in self.sizes.items() if name in own}
        return replace(self, sizes={**self.sizes, **sizes})


def read_weights(pipe: Any, modules: Mapping[str, nn.Module], blobs: Mapping[str, int]) -> Weights:
    """Read the weights of a skeleton; `blobs` are the bytes of components that have none."""
    sizes: dict[str, tuple[int, ...]] = {}
    blocks: dict[str, tuple[tuple[str, ...], ...]] = {}
    for component, root in modules.items():
        seen: set[int] = set()
        for name, module in root.named_modules():
            own = []
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                storage = tensor.untyped_storage()
                if storage._cdata not in seen and storage.nbytes():
                    seen.add(storage._cdata)
                    own.append(int(storage.nbytes()))
            if own:
                sizes[_path(component, name)] = tuple(own)
        _read_blocks(component, root, blocks)
    sizes |= {name: (size,) for name, size in blobs.items() if size}
    sequence = getattr(type(pipe), "model_cpu_offload_seq", None) or ""
    return Weights(
        sizes=sizes,
        order=(*modules, *blobs),
        sequence=tuple(name for name in sequence.split("->") if name in modules or name in blobs),
        always=tuple(getattr(pipe, "_exclude_from_cpu_offload", None) or ()),
        blocks=blocks,
    )


def _read_blocks(path: str, root: nn.Module, blocks: dict[str, tuple[tuple[str, ...], ...]]) -> None:
    """Find the lists of blocks of a module; where its class names modules to look into, of those as well."""
    inner = getattr(root, "_group_offload_block_modules", None) or ()
    found = []
    for name, child in root.named_children():
        if name in inner:
            _read_blocks(f"{path}.{name}", child, blocks)
        elif isinstance(child, (nn.ModuleList, nn.Sequential)):
            found.append(tuple(f"{path}.{name}.{index}" for index in range(len(child))))
    blocks[path] = tuple(found)


def _path(component: str, name: str) -> str:
    return f"{component}.{name}" if name else component


def marked_paths(weights: Weights) -> set[str]:
    """The modules whose beginning and end a replay under some offload has to know of."""
    blocks = {block for lists in weights.blocks.values() for blocks in lists for block in blocks}
    return {*weights.sizes, *weights.order, *weights.blocks, *blocks}


class Residency:
    """All weights on the device from the start; the base of the offloads."""

    def __init__(self, weights: Weights, allocator: Allocator) -> None:
        self.weights, self.allocator = weights, allocator
        self.held: dict[str, list[Block]] = {}

    def begin(self) -> None:
        """Put on the device what is there before a call."""
        for owner in self.weights.sizes:
            self.load(owner)

    def enter(self, path: str) -> None:
        """A module begins."""

    def leave(self, path: str) -> None:
        """A module ends."""

    def prepare(self, events: Sequence[Event]) -> None:
        """Look at what is about to run."""

    def load(self, owner: str, pool: int = DEFAULT_POOL) -> None:
        """Bring a module's own weights in."""
        if owner not in self.held:
            sizes = self.weights.sizes[owner]
            self.held[owner] = [self.allocator.allocate(size, "weights", pool) for size in sizes]

    def unload(self, owner: str) -> None:
        """Send a module's own weights away."""
        for block in self.held.pop(owner, ()):
            self.allocator.free(block)

    def widen(self, component: str, keep: bool) -> None:
        """Cast a component's weights to twice their width, one after the other; `keep`: beside the old ones."""
        for owner in self.weights.owners(component):
            if (blocks := self.held.get(owner)) is None:
                continue
            for index, block in enumerate(list(blocks)):
                wide = self.allocator.allocate(2 * block.requested, "weights", block.pool[0])
                if keep:
                    blocks.append(wide)
                else:
                    blocks[index] = wide
                    self.allocator.free(block)

    def narrow(self, component: str) -> None:
        """Undo `widen`."""
        for owner in self.weights.owners(component):
            blocks = self.held.get(owner, [])
            for index, block in enumerate(blocks):
                blocks[index] = self.allocator.allocate(block.requested // 2, "weights", block.pool[0])
                self.allocator.free(block)


class ByModel(Residency):
    """Model offload: a component comes when it is called and stays until the next of the sequence is called."""

    def begin(self) -> None:
        """Put the components on the device that offload leaves there."""
        for component in self.weights.always:
            self._bring(component)

    def enter(self, path: str) -> None:
        """Bring a component in, after sending its forerunner away."""
        if path not in self.weights.order:
            return
        sequence = self.weights.sequence
        if path in sequence and (place := sequence.index(path)) > 0:
            before = self.weights.owners(sequence[place - 1])
            if any(owner in self.held for owner in before):
                for owner in before:
                    self.unload(owner)
                self.allocator.empty_cache()  # accelerate's hook clears the cache when it sends a model away
        self._bring(path)

    def _bring(self, component: str) -> None:
        for owner in self.weights.owners(component):
            self.load(owner)


class ByGroup(Residency):
    """Sequential and group offload: groups of weights come when their first module begins and go after their last."""

    def __init__(
        self,
        weights: Weights,
        allocator: Allocator,
        groups: Sequence[Group],
        *,
        resident: Sequence[str] = (),
        whole: Sequence[str] = (),
        stream: bool = False,
    ) -> None:
        super().__init__(weights, allocator)
        self.resident, self.whole, self.stream = resident, whole, stream
        self.pool = STREAM_POOL if stream else DEFAULT_POOL
        self.starting: dict[str, list[Group]] = {}
        self.ending: dict[str, list[Group]] = {}
        for group in groups:
            self.starting.setdefault(group.first, []).append(group)
            self.ending.setdefault(group.last, []).append(group)
        self.following: dict[str, Group] = {}

    def begin(self) -> None:
        """Put the components on the device that are not offloaded."""
        for component in self.resident:
            for owner in self.weights.owners(component):
                self.load(owner)

    def prepare(self, events: Sequence[Event]) -> None:
        """Learn the order in which groups begin, for a stream to fetch the next one ahead."""
        if not self.stream:
            return
        first: dict[str, None] = {}
        for event in events:
            # an autoencoder is entered past its own forward, so that no order is learnt there
            if isinstance(event, Entered) and event.path in self.starting and not event.path.startswith("vae"):
                first.setdefault(event.path)
        paths = list(first)
        for path, after in itertools.pairwise(paths):
            if path.split(".")[0] == after.split(".")[0]:
                self.following[path] = self.starting[after][0]

    def enter(self, path: str) -> None:
        """Bring in the groups that begin here, and with a stream the one after."""
        if path in self.whole:
            for owner in self.weights.owners(path):
                self.load(owner)
        for group in self.starting.get(path, ()):
            self._bring(group)
        if (ahead := self.following.get(path)) is not None:
            self._bring(ahead)

    def leave(self, path: str) -> None:
        """Send away the groups that end here."""
        for group in self.ending.get(path, ()):
            for owner in group.owners:
                self.unload(owner)

    def _bring(self, group: Group) -> None:
        for owner in group.owners:
            self.load(owner, self.pool)


class ByShare(Residency):
    """Partial offload: of the looped components some layers stay, the others pass through a window; the rest comes
    to work and leaves. From the second picture on, when the order of the layers is known: that of `step`, which are
    the events of one; layers that have no part in it come last.
    """

    def __init__(
        self,
        weights: Weights,
        allocator: Allocator,
        looped: Sequence[str],
        offload: PartialOffload,
        step: Sequence[Event] = (),
    ) -> None:
        super().__init__(weights, allocator)
        self.looped, self.leaves = looped, offload.denoiser_leaves
        size = {owner: sum(map(aligned, sizes)) for owner, sizes in weights.sizes.items()}
        single = (owner for component in offload.alone for owner in _layers(weights.owners(component))[0])
        self.alone = {owner for owner in single if size[owner] > SMALL_BYTES}
        owners = [owner for component in looped for owner in weights.owners(component)]
        layers, fixed = _layers(owners)
        entered = dict.fromkeys(event.path for event in step if isinstance(event, Entered))
        places = {path: place for place, path in enumerate(entered)}
        layers.sort(key=lambda owner: places.get(owner, len(places)))
        resident_bytes = offload.stays(sum(size[owner] for owner in owners))
        groups = join_neighbours([size[owner] for owner in layers])
        sizes = [sum(size[layers[index]] for index in group) for group in groups]
        streamed = choose_streamed(sizes, max(0, resident_bytes - sum(size[owner] for owner in fixed)))
        kept = [layers[index] for place, group in enumerate(groups) if place not in streamed for index in group]
        self.staying = (*fixed, *kept)
        self.window_sizes = window_sizes(sizes, streamed, offload.window)
        self.window: list[Block] = []
        self.working: str | None = None

    def begin(self) -> None:
        """Put on the device what stays there between pictures."""
        if not self.leaves:
            self._bring(self.staying)

    def enter(self, path: str) -> None:
        """Bring a component in, after sending away what it does not work with; or a layer that comes alone."""
        if path in self.alone:
            self.load(path)
        if path not in self.weights.order:
            return
        if path in self.looped:
            self._send_working()
            if self.window_sizes and any(owner not in self.held for owner in self.staying):
                self.allocator.empty_cache()
            self._bring(self.staying)
            if not self.window:
                self.window = [self.allocator.allocate(size, "weights") for size in self.window_sizes]
        elif path != self.working:
            self._send_working()
            for block in self.window:
                self.allocator.free(block)
            self.window = []
            if self.leaves:
                for owner in self.staying:
                    self.unload(owner)
            self._bring([owner for owner in self.weights.owners(path) if owner not in self.alone])
            self.working = path

    def leave(self, path: str) -> None:
        """Send a layer away that came alone."""
        if path in self.alone:
            self.unload(path)

    def _send_working(self) -> None:
        if self.working is not None:
            for owner in self.weights.owners(self.working):
                self.unload(owner)
            self.working = None

    def _bring(self, owners: Sequence[str]) -> None:
        for owner in owners:
            self.load(owner)


def _layers(owners: Sequence[str]) -> tuple[list[str], list[str]]:
    """Tell owners of weights that have none below them from those that have."""
    above = {owner[:end] for owner in owners for end in range(len(owner)) if owner[end] == "."}
    return [owner for owner in owners if owner not in above], [owner for owner in owners if owner in above]


def residency_of(
    offload: Options | None,
    weights: Weights,
    allocator: Allocator,
    *,
    vae_as_a_whole: bool = False,
    looped: Sequence[str] = (),
    step: Sequence[Event] = (),
) -> Residency:
    """Return how weights come and go under an offload, None being none; `looped` are called at every `step`."""
    if isinstance(offload, PartialOffload):
        return ByShare(weights, allocator, looped, offload, step)
    if isinstance(offload, ModelOffload):
        return ByModel(weights, allocator)
    if isinstance(offload, SequentialOffload):
        resident = [name for name in weights.order if name in weights.always]
        return ByGroup(weights, allocator, _leaves(weights, resident), resident=resident)
    if isinstance(offload, GroupOffload):
        named = offload.exclude_modules or ()
        resident = [named] if isinstance(named, str) else list(named)
        whole = ["vae"] if vae_as_a_whole and "vae" not in resident else []
        left = [*resident, *whole]
        leaves = offload.offload_type == "leaf_level"
        together = 1 if offload.use_stream else offload.num_blocks_per_group or 1
        groups = _leaves(weights, left) if leaves else _block_groups(weights, left, together)
        return ByGroup(weights, allocator, groups, resident=resident, whole=whole, stream=offload.use_stream)
    return Residency(weights, allocator)


def _leaves(weights: Weights, left_out: Sequence[str]) -> list[Group]:
    return [
        Group(first=owner, last=owner, owners=(owner,))
        for owner in weights.sizes
        if owner.split(".")[0] not in left_out
    ]


def _block_groups(weights: Weights, left_out: Sequence[str], together: int) -> list[Group]:
    """Blocks in chunks, and for each module with blocks the rest of it."""
    groups: list[Group] = []
    taken: set[str] = set()
    for lists in weights.blocks.values():
        for blocks in lists:
            for start in range(0, len(blocks), together):
                chunk = blocks[start : start + together]
                owners = tuple(owner for block in chunk for owner in weights.owners(block))
                groups.append(Group(first=chunk[0], last=chunk[-1], owners=owners))
                taken.update(owners)
    # inner modules first, so that what is left of them is not counted with what they are in
    for path in sorted(weights.blocks, key=lambda path: -path.count(".")):
        rest = tuple(owner for owner in weights.owners(path) if owner not in taken)
        groups.append(Group(first=path, last=path, owners=rest))
        taken.update(rest)
    groups.extend(
        Group(first=name, last=name, owners=weights.owners(name))
        for name in weights.order
        if name not in weights.blocks
    )
    return [group for group in groups if group.first.split(".")[0] not in left_out and group.owners]
