"""The switches of the VAE: pictures one by one or in tiles, and a copy that spares its casts."""

from __future__ import annotations

from .planning import options as opt
from .switching import Switching


class EasesTheVAE(Switching):
    """Part of TurboMixin: what lets the VAE do with less memory, or with less moving."""

    def enable_vae_slicing(self) -> None:
        """Exact: the VAE works on the pictures of a batch one by one."""
        self._enable(opt.VAESlicing())

    def disable_vae_slicing(self) -> None:
        """Switch `enable_vae_slicing` off."""
        self._disable("enable_vae_slicing")

    def enable_vae_tiling(self, tile_size: int | None = None, overlap: float | None = None) -> None:
        """Lossy: the VAE works in overlapping, feathered tiles on pictures above `tile_size`.

        AutoencoderKL's tiles share the group-norm statistics of the whole picture; other autoencoders keep diffusers'
        own tiling.

        Args:
            tile_size: side of a tile in pixels; by default half the model's own picture, at most 512.
            overlap: fraction of a tile shared with its neighbour, 0 to 0.5; by default 0.25.
        """
        self._enable(opt.VAETiling(tile_size=tile_size, overlap=overlap))

    def disable_vae_tiling(self) -> None:
        """Switch `enable_vae_tiling` off."""
        self._disable("enable_vae_tiling")

    def enable_vae_exact_tiling(self, tile_size: int = 256, hold_on: str = "device") -> None:
        """Exact: AutoencoderKL works in tiles and gives the untiled picture, for about twice the work of a decode.

        Each tile is cut out with as much around it as its layers look at, and group norms are settled one after the
        other over all tiles. Between two residual blocks the picture is held whole. Encoding is done
        in the same way. Takes the place of `enable_vae_tiling`.

        Args:
            tile_size: in pixels, the side of a square with as many pixels as a tile, where the decoder has 256
                channels; where it has more, tiles are smaller. Pictures up to this size are decoded as ever.
            hold_on: "device", or "host": then only a tile is on the device, and each layer's picture goes to host
                memory (page-locked on CUDA) and comes back, strip by strip.
        """
        self._enable(opt.VAEExactTiling(tile_size=tile_size, hold_on=hold_on))

    def disable_vae_exact_tiling(self) -> None:
        """Switch `enable_vae_exact_tiling` off."""
        self._disable("enable_vae_exact_tiling")

    def enable_vae_upcast_copy(self) -> None:
        """Exact: a float32 copy of the VAE's weights is kept, for pipelines that decode in float32 (SDXL).

        diffusers casts the VAE before each decode and back after it; here both exchange pointers, to the same bits. The
        copy takes 4 bytes a weight: 320 MiB for SDXL's VAE.

        Raises:
            NotSupportedError: the pipeline does not cast its VAE, or offload is on.
        """
        self._enable(opt.VAEUpcastCopy())

    def disable_vae_upcast_copy(self) -> None:
        """Switch `enable_vae_upcast_copy` off, and give the copy's memory back."""
        self._disable("enable_vae_upcast_copy")
