"""What stands in for AutoencoderKL's own tiled decoding and encoding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..planning.units import gib
from ..tiling.canvas import Canvas, Grid
from ..tiling.grid import Axis
from ..tiling.halves import decode_in_tiles, encode_in_tiles, largest_held, refusal_of
from ..tiling.statistics import poolable, shared_by
from .held_pictures import HeldOnHost


@dataclass(eq=False)
class TiledHalf:
    """One half of an AutoencoderKL, tile by tile, one picture of the batch after the other.

    Tile and overlap are read from the attributes that diffusers' own tiling reads: what a user sets there holds.

    Attributes:
        vae: whose half it is.
        step: pixels per latent.
    """

    vae: Any
    step: int
    alone: bool = False
    """Whether the last call's tiles were normalised each by itself, since offload moves the norms' weights."""

    def tell(self) -> list[str]:
        """Say what became of the last call's tiles, where it is not what was asked for."""
        apart = "tiles were normalised each by itself, since offload moves the norms' weights one by one"
        return [f"{apart}: seams may show"] if self.alone else []

    def paint(self, network: nn.Module, inner: nn.Module | None, source: Tensor, *, decodes: bool) -> Tensor:
        """Run `network` (after `inner` when it decodes, before it otherwise) over the tiles of `source`."""
        norms = poolable(network)
        self.alone = not norms
        # norms whose statistics change from picture to picture belong into no graph and no compiled code
        call: Callable[[Tensor], Tensor] = network._call_impl if norms else network
        parts = [part for part in ((inner, call) if decodes else (call, inner)) if part is not None]

        def run(tile: Tensor) -> Tensor:
            for part in parts:
                tile = part(tile)
            return tile

        last = inner if inner is not None and not decodes else getattr(network, "conv_out", None)
        return _one_by_one(lambda picture: self._picture(run, norms, picture, decodes, last), source)

    def _picture(self, run: Any, norms: list[nn.GroupNorm], source: Tensor, decodes: bool, last: Any) -> Tensor:
        grid = self._grid(source, decodes)
        # before the first tile, whose blocks it would else lie in and keep from being given back
        canvas = _canvas(grid, source, last)
        if not norms:
            return grid.paint(run, source, canvas)

        def measure() -> None:
            for tile in self._grid(source, decodes, overlap=0).tiles(source):
                run(tile)

        with shared_by(norms, measure):
            return grid.paint(run, source, canvas)

    def _grid(self, source: Tensor, decodes: bool, overlap: int | None = None) -> Grid:
        tile = self.vae.tile_latent_min_size
        if overlap is None:
            overlap = tile - max(1, int(tile * (1 - self.vae.tile_overlap_factor)))
        reads, writes = (1, self.step) if decodes else (self.step, 1)
        rows, columns = (Axis(side // reads, tile, overlap) for side in source.shape[2:])
        return Grid(rows, columns, reads, writes)


def _one_by_one(run: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
    """Run a batch picture after picture."""
    first = run(batch[:1])
    if len(batch) == 1:
        return first
    results = first.new_empty(len(batch), *first.shape[1:])
    results[:1] = first
    del first
    for index in range(1, len(batch)):
        results[index : index + 1] = run(batch[index : index + 1])
    return results


def _canvas(grid: Grid, source: Tensor, last: Any) -> Canvas | None:
    """Make the canvas for what a network's last layer will answer; None where that is not known."""
    if not isinstance(last, nn.Conv2d):
        return None
    kind = source.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return grid.canvas(source, last.out_channels, torch.get_autocast_dtype(kind) if autocast else last.weight.dtype)


class TiledDecode(TiledHalf):
    """Stands in for `tiled_decode`."""

    def __call__(self, z: Tensor, return_dict: bool = True) -> Any:
        """Decode latents `[B, C, h, w]` to pictures `[B, 3, H, W]`."""
        from diffusers.models.autoencoders.vae import DecoderOutput

        sample = self.paint(self.vae.decoder, self.vae.post_quant_conv, z, decodes=True)
        return DecoderOutput(sample=sample) if return_dict else (sample,)


class TiledEncode(TiledHalf):
    """Stands in for `_tiled_encode`."""

    def __call__(self, x: Tensor) -> Tensor:
        """Encode pictures `[B, 3, H, W]` to moments `[B, 2 * C, h, w]`."""
        return self.paint(self.vae.encoder, self.vae.quant_conv, x, decodes=False)


@dataclass(eq=False)
class ExactHalf:
    """One half of an AutoencoderKL in tiles that give the untiled result, one picture of the batch after the other.

    Attributes:
        vae: whose half it is.
        tile: side of a tile in pixels.
        held: where pictures lie between layers; None: on the device.
        alone: whether the last call was of the whole picture, since offload moves the norms' weights.
    """

    vae: Any
    tile: int
    held: HeldOnHost | None = None
    alone: bool = False

    def tell(self) -> list[str]:
        """Say what became of the last call's tiles, where it is not what was asked for."""
        told = ["the VAE worked as a whole, since offload moves the norms' weights one by one"] if self.alone else []
        if self.held is not None and self.held.size:
            told.append(f"{gib(self.held.size)} of host memory are kept for the pictures of the next call")
        if self.held is not None and self.held.trouble:
            told.append(f"they wait in ordinary memory, which is slower to copy: {self.held.trouble}")
        return told

    def run(self, half: nn.Module, in_tiles: Callable[..., Tensor], x: Tensor) -> Tensor:
        """Run a half over `[1, C, h, w]`."""
        self.alone = not poolable(half)
        if self.alone:
            whole: Tensor = half(x)
            return whole
        if self.held is None:
            return in_tiles(half, x, self.tile)
        with self.held.lent(x.device, largest_held(half, x)) as memory:
            return in_tiles(half, x, self.tile, memory.hold)


class ExactDecode(ExactHalf):
    """Stands in for `tiled_decode`."""

    def __call__(self, z: Tensor, return_dict: bool = True) -> Any:
        """Decode latents `[B, C, h, w]` to pictures `[B, 3, H, W]`."""
        from diffusers.models.autoencoders.vae import DecoderOutput

        sample = _one_by_one(self._decode, z)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def _decode(self, z: Tensor) -> Tensor:
        if self.vae.post_quant_conv is not None:
            z = self.vae.post_quant_conv(z)
        return self.run(self.vae.decoder, decode_in_tiles, z)


class ExactEncode(ExactHalf):
    """Stands in for `_tiled_encode`; an encoder that cannot be cut works on whole pictures."""

    def __call__(self, x: Tensor) -> Tensor:
        """Encode pictures `[B, 3, H, W]` to moments `[B, 2 * C, h, w]`."""
        return _one_by_one(self._encode, x)

    def _encode(self, x: Tensor) -> Tensor:
        encoder = self.vae.encoder
        moments = encoder(x) if refusal_of(encoder) else self.run(encoder, encode_in_tiles, x)
        return moments if self.vae.quant_conv is None else self.vae.quant_conv(moments)


@dataclass
class TilesDone:
    """Says how the tiles of a pipeline's VAE fared; changes nothing itself."""

    halves: tuple[TiledHalf | ExactHalf, ...]

    def revert(self) -> None:
        """Nothing to put back."""

    def tell(self) -> list[str]:
        """Say where tiles did without the statistics of the whole picture, were none, or slower than meant."""
        return list(dict.fromkeys(sentence for half in self.halves for sentence in half.tell()))
