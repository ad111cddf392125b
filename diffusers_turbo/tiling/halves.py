"""An autoencoder's halves in tiles that give the untiled result, for about twice the work.

Each is cut into stretches, a residual block each, between which pictures are held whole. The middle, with its attention
over the whole picture, is at the resolution of the latents and runs as ever.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from .exact import Stretch
from .pictures import Hold, OnDevice, Picture


def refusal_of(half: Any) -> str:
    """Say why a decoder or an encoder cannot be cut into stretches; empty where it can."""
    from diffusers.models.resnet import Downsample2D, ResnetBlock2D, Upsample2D
    from diffusers.models.unets.unet_2d_blocks import DownEncoderBlock2D, UpDecoderBlock2D

    blocks = _blocks(half)
    names = ("conv_in", "mid_block", "conv_norm_out", "conv_act", "conv_out")
    if not blocks or not all(hasattr(half, name) for name in names):
        return f"a {type(half).__name__}"
    for block in blocks:
        if type(block) not in (UpDecoderBlock2D, DownEncoderBlock2D):
            return f"a {type(block).__name__}"
        for layer in (*block.resnets, *_samplers(block)):
            if type(layer) not in (ResnetBlock2D, Upsample2D, Downsample2D):
                return f"a {type(layer).__name__}"
            if isinstance(layer, ResnetBlock2D) and type(layer.norm1) is not nn.GroupNorm:
                return f"residual blocks with {type(layer.norm1).__name__}"
    return "" if type(half.conv_norm_out) is nn.GroupNorm else f"a {type(half.conv_norm_out).__name__}"


def stretches_of(half: Any) -> list[Stretch]:
    """Cut what comes after a decoder's middle, or before an encoder's, into stretches.

    An upsampled picture is not held, for it is the largest there is. A 3x3 convolution looks one pixel far, a residual
    block has two of them.
    """
    decodes = hasattr(half, "up_blocks")
    found: list[Stretch] = []
    before: Any = None if decodes else half.conv_in
    for block in _blocks(half):
        for resnet in block.resnets:
            found.append(
                Stretch(
                    layers=(resnet,) if before is None else (before, resnet),
                    norms=(resnet.norm1, resnet.norm2),
                    channels=max(resnet.in_channels, resnet.out_channels),
                    reach=2 if before is None else 3,
                    up=2 if decodes and before is not None else 1,
                )
            )
            before = None
        for sampler in _samplers(block):
            if decodes:
                before = sampler
            else:
                found.append(Stretch(layers=(sampler,), norms=(), channels=sampler.channels, reach=1, down=2))
    if decodes:
        norm: nn.GroupNorm = half.conv_norm_out
        last = (norm, half.conv_act, half.conv_out)
        found.append(Stretch(layers=last, norms=(norm,), channels=norm.num_channels, reach=1))
    return found


def tiled_layers(half: Any) -> list[nn.Module]:
    """Return the modules that are called tile after tile; none of what cannot be cut into stretches."""
    layers = [] if refusal_of(half) else [layer for stretch in stretches_of(half) for layer in stretch.layers]
    return [layer for layer in layers if not isinstance(layer, nn.GroupNorm)]


def largest_held(half: Any, x: Tensor) -> int:
    """Return the bytes of the largest picture between stretches, for what the half is given, `[1, C, h, w]`."""
    scale, most = 1.0, 1.0
    for stretch in stretches_of(half)[:-1]:
        scale *= stretch.up / stretch.down
        most = max(most, scale**2 * stretch.layers[-1].out_channels)
    return int(most * x[0, 0].nbytes)


def decode_in_tiles(decoder: Any, z: Tensor, tile: int, hold: Hold = OnDevice.like) -> Tensor:
    """Decode `[1, C, h, w]` to a picture `[1, 3, H, W]`, the untiled one up to rounding.

    Args:
        decoder: of an AutoencoderKL.
        z: latents, past the convolution after quantisation.
        tile: side of a square in pixels of which a tile has as many, where the decoder has 256 channels.
        hold: makes the pictures between stretches.
    """
    return _through(stretches_of(decoder), lambda: decoder.mid_block(decoder.conv_in(z), None), tile, hold)


def encode_in_tiles(encoder: Any, x: Tensor, tile: int, hold: Hold = OnDevice.like) -> Tensor:
    """Encode a picture `[1, 3, H, W]` to moments `[1, 2 * C, h, w]`, the untiled ones up to rounding.

    Args:
        encoder: of an AutoencoderKL.
        x: the picture.
        tile: side of a square in pixels of which a tile has as many, where the encoder has up to 256 channels.
        hold: makes the pictures between stretches.
    """
    middle = encoder.mid_block(_through(stretches_of(encoder), lambda: x, tile, hold))
    moments: Tensor = encoder.conv_out(encoder.conv_act(encoder.conv_norm_out(middle)))
    return moments


def _through(stretches: list[Stretch], begin: Callable[[], Tensor], tile: int, hold: Hold) -> Tensor:
    # made here: whoever had it for an argument would hold it to the end
    picture: Picture = OnDevice(begin())
    for stretch, following in pairwise(stretches):
        picture = stretch.in_tiles(picture, tile, hold, measured=following.begins_with_norm)
    picture = stretches[-1].in_tiles(picture, tile, OnDevice.like)
    return picture.rows(0, picture.height)


def _blocks(half: Any) -> list[Any]:
    return list(getattr(half, "up_blocks", None) or getattr(half, "down_blocks", None) or ())


def _samplers(block: Any) -> tuple[Any, ...]:
    return tuple(getattr(block, "upsamplers", None) or getattr(block, "downsamplers", None) or ())
