"""What makes a pipeline smaller: VAE slices and tiles, offload."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..base import Options, is_int
from ..units import parse_bytes

OFFLOAD_TYPES = ("block_level", "leaf_level")

ALL = "all"
"""What may be written for a denoiser that stays whole."""


SLICED_DENOISERS = (
    "UNet2DConditionModel",
    "SD3Transformer2DModel",
    "FluxTransformer2DModel",
    "PixArtTransformer2DModel",
)
"""Denoisers of which it is known that no sample of a batch depends on another, and which arguments have one each."""


@dataclass(frozen=True, kw_only=True)
class DenoiserSlicing(Options):
    """Have the denoiser work on `slice_size` samples of a batch at a time; guidance has two of each picture."""

    action = "enable_denoiser_slicing"
    slot = "denoiser_slicing"

    slice_size: int = 1

    def __post_init__(self) -> None:
        self._check_positive("slice_size")
        if self.slice_size is None:
            raise self._refuse("slice_size", "a number of samples from 1 on", "leave slice_size out for 1")


@dataclass(frozen=True, kw_only=True)
class VAESlicing(Options):
    """Decode the pictures of a batch one after the other."""

    action = "enable_vae_slicing"
    slot = "vae_slicing"


@dataclass(frozen=True, kw_only=True)
class VAETiling(Options):
    """Decode each picture in overlapping tiles. LOSSY: a tile sees only itself, and borders are blended.

    `tile_size` in pixels of the picture's side; `overlap` as a fraction of the tile.
    """

    action = "enable_vae_tiling"
    slot = "vae_tiling"
    exact = False
    lossy_reason = "a tile's attention and convolutions see only the tile, and borders are blended"

    tile_size: int | None = None
    overlap: float | None = None

    def __post_init__(self) -> None:
        # 8 pixels per latent is the smallest step of every KL autoencoder diffusers ships for images.
        self._check_positive("tile_size", multiple_of=8)
        if self.overlap is not None and not (
            isinstance(self.overlap, (int, float)) and not isinstance(self.overlap, bool) and 0 <= self.overlap <= 0.5
        ):
            # beyond one half a tile reaches over its neighbour, and the blend only knows neighbours
            raise self._refuse("overlap", "a fraction from 0 to 0.5 of the tile", "use 0.25, or leave overlap out")


@dataclass(frozen=True, kw_only=True)
class VAEExactTiling(Options):
    """Decode and encode in tiles that see as far as their layers look, with the group norms of the whole picture.

    `tile_size` in pixels: the side of a square with as many pixels as a tile, where the decoder has 256 channels.
    `hold_on` says where whole pictures wait between two layers: on the "device", or in memory of the "host".
    """

    action = "enable_vae_exact_tiling"
    slot = "vae_tiling"

    tile_size: int = 256
    hold_on: str = "device"

    def __post_init__(self) -> None:
        self._check_positive("tile_size", multiple_of=8)
        self._check_choice("hold_on", ("device", "host"))


@dataclass(frozen=True, kw_only=True)
class ModelOffload(Options):
    """Keep one whole component on the device at a time, the others in host memory."""

    action = "enable_model_cpu_offload"
    slot = "offload"

    gpu_id: int | None = None
    device: Any = None

    def __post_init__(self) -> None:
        _check_gpu_id(self, self.gpu_id)


@dataclass(frozen=True, kw_only=True)
class SequentialOffload(Options):
    """Keep one layer's weights on the device at a time: the least memory, and the slowest."""

    action = "enable_sequential_cpu_offload"
    slot = "offload"

    gpu_id: int | None = None
    device: Any = None

    def __post_init__(self) -> None:
        _check_gpu_id(self, self.gpu_id)


def _check_gpu_id(options: Options, gpu_id: int | None) -> None:
    if gpu_id is not None and (not is_int(gpu_id) or gpu_id < 0):
        raise options._refuse("gpu_id", "a device number from 0 on", "leave gpu_id out to use the current device")


@dataclass(frozen=True, kw_only=True)
class MemoryFallback(Options):
    """Make room and try again when a component runs out of memory; `allow_tiling` lets it tile the VAE, at last."""

    action = "enable_memory_fallback"
    slot = "memory_fallback"

    allow_tiling: bool = False

    def __post_init__(self) -> None:
        self._check_flags("allow_tiling")


@dataclass(frozen=True, kw_only=True)
class GroupOffload(Options):
    """Keep groups of layers on the device, the rest in host memory (or on disk), with prefetch on a stream."""

    action = "enable_group_offload"
    slot = "offload"

    onload_device: Any = None
    offload_device: Any = "cpu"
    offload_type: str = "block_level"
    num_blocks_per_group: int | None = None
    non_blocking: bool = False
    use_stream: bool = False
    record_stream: bool = False
    low_cpu_mem_usage: bool = False
    offload_to_disk_path: str | None = None
    exclude_modules: str | tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.exclude_modules, list):
            object.__setattr__(self, "exclude_modules", tuple(self.exclude_modules))
        self._check_choice("offload_type", OFFLOAD_TYPES)
        self._check_flags("non_blocking", "use_stream", "record_stream", "low_cpu_mem_usage")
        self._check_positive("num_blocks_per_group")
        if self.offload_type == "leaf_level" and self.num_blocks_per_group is not None:
            raise self._refuse("num_blocks_per_group", 'offload_type="block_level"', "leave num_blocks_per_group out")
        if self.use_stream and self.num_blocks_per_group not in (None, 1):
            raise self._refuse("num_blocks_per_group", "1 with use_stream=True", "set it to 1, or use_stream=False")
        if self.record_stream and not self.use_stream:
            raise self._refuse("record_stream", "use_stream=True", "set use_stream=True, or leave record_stream out")


@dataclass(frozen=True, kw_only=True)
class PartialOffload(Options):
    """Keep as much of the denoiser on the device as `resident_bytes` allow, and stream the rest through it.

    None (or "all") keeps all of it, for as long as it works: then only whole components come and go.
    """

    action = "enable_partial_offload"
    slot = "offload"

    resident_bytes: int | str | None = 0
    pin_memory: bool = True
    pinned_bytes: int | str | None = None
    denoiser_leaves: bool = False
    by_layers: str | tuple[str, ...] | None = None
    prefetch: bool = True
    device: Any = None

    def __post_init__(self) -> None:
        if isinstance(self.by_layers, (str, list)):
            names = [self.by_layers] if isinstance(self.by_layers, str) else self.by_layers
            object.__setattr__(self, "by_layers", tuple(names))
        if not all(isinstance(name, str) for name in self.alone):
            raise self._refuse("by_layers", "names of components", 'name components, such as "text_encoder"')
        if self.resident_bytes == ALL:
            object.__setattr__(self, "resident_bytes", None)
        for name in ("resident_bytes", "pinned_bytes"):
            value = getattr(self, name)
            if isinstance(value, str):
                object.__setattr__(self, name, parse_bytes(value, name=name))
            elif value is not None and (not is_int(value) or value < 0):
                raise self._refuse(name, 'bytes from 0 on, or text such as "6GB"', f"give {name} as a number of bytes")
        self._check_flags("pin_memory", "denoiser_leaves", "prefetch")
        if self.pinned_bytes is not None and not self.pin_memory:
            raise self._refuse("pinned_bytes", "pin_memory=True", "leave pinned_bytes out, or pin_memory on")

    @property
    def alone(self) -> tuple[str, ...]:
        """The components whose layers come one by one."""
        return tuple(self.by_layers or ())

    @property
    def window(self) -> int:
        """Streamed groups on the device at a time: the one that works, and with `prefetch` the one that comes."""
        return 2 if self.prefetch else 1

    @property
    def keeps_all(self) -> bool:
        """Whether the denoiser is asked to be there whole."""
        return self.resident_bytes is None

    def stays(self, whole: int) -> int:
        """Return how many of a denoiser's bytes stay."""
        return whole if self.resident_bytes is None else min(whole, int(self.resident_bytes))
