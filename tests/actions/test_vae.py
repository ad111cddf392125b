"""VAE tiling really tiles at the size asked for, slicing really slices, and both say when they would do nothing."""

from __future__ import annotations

import itertools

import pytest
import torch
from diffusers import AutoencoderKLWan

from diffusers_turbo import turbo
from diffusers_turbo.actions.vae import _tile_attributes, _whole_overlap
from diffusers_turbo.parity import distance
from tests import tiny


def decoder_inputs(pipe) -> list[tuple[int, ...]]:
    """Record the shape `[B, C, h, w]` of every decoder call from now on."""
    shapes: list[tuple[int, ...]] = []
    pipe.vae.decoder.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape)))
    return shapes


def test_strides_and_borders_meet():
    """As AutoencoderKL computes them, for decoding (from latents) and encoding (from pixels)."""
    for latents, overlap in itertools.product(range(4, 129), (0.0, 0.1, 0.2, 0.25, 1 / 3, 0.4, 0.5)):
        factor = _whole_overlap(latents, 8, overlap)
        assert int(latents * (1 - factor)) * 8 == latents * 8 - int(latents * 8 * factor)
        assert int(latents * 8 * (1 - factor)) == (latents - int(latents * factor)) * 8
        assert abs(factor - overlap) <= 3 / latents


@pytest.mark.parametrize("tile_size", [32, 40, 48])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5])
def test_every_tile_has_the_size_asked_for(tile_size, overlap):
    pipe = turbo(tiny.sd())
    stock = tiny.picture(pipe)
    pipe.enable_vae_tiling(tile_size=tile_size, overlap=overlap)
    shapes = decoder_inputs(pipe)
    ours = tiny.picture(pipe)
    assert len(shapes) >= 4
    assert max(max(shape[2:]) for shape in shapes) == tile_size // 8
    assert ours.shape == stock.shape
    assert 10 < distance(ours, stock).psnr_db < 90


def test_the_default_tile_is_below_the_models_own_size():
    pipe = turbo(tiny.sd())
    pipe.enable_vae_tiling()
    shapes = decoder_inputs(pipe)
    tiny.picture(pipe)
    assert len(shapes) > 1
    assert "pictures above 32 px a side are tiled" in str(pipe.turbo_report())


def test_a_tile_that_would_do_nothing_says_so():
    pipe = turbo(tiny.sd())
    pipe.enable_vae_tiling(tile_size=64)
    assert "a no-op at this model's own size of 64 px" in str(pipe.turbo_report())
    shapes = decoder_inputs(pipe)
    tiny.picture(pipe)
    assert len(shapes) == 1


def test_other_settings_replace_the_earlier_ones_and_undo_restores_the_original():
    pipe = turbo(tiny.sd())
    own = (pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size, pipe.vae.tile_overlap_factor)
    pipe.enable_vae_tiling(tile_size=32)
    pipe.enable_vae_tiling(tile_size=48, overlap=0.5)
    assert (pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size, pipe.vae.tile_overlap_factor) == (48, 6, 0.5)
    assert len(pipe.turbo_report().levers) == 1
    pipe.disable_vae_tiling()
    assert (pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size, pipe.vae.tile_overlap_factor) == own


def test_slicing_decodes_one_picture_at_a_time_to_the_same_bits():
    pipe = turbo(tiny.sd())
    pipe.enable_vae_slicing()
    shapes = decoder_inputs(pipe)
    ours = tiny.picture(pipe, batch=3)
    assert [shape[0] for shape in shapes] == [1, 1, 1]
    pipe.disable_vae_slicing()
    assert distance(ours, tiny.picture(pipe, batch=3)).psnr_db >= 90


def test_autoencoders_with_sides_and_strides():
    """The newer autoencoders name sides and strides in pixels."""
    vae = AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False] * 3
    )
    values = _tile_attributes(vae, 128, 0.25, 8, "enable_vae_tiling()")
    assert values["tile_sample_min_height"] == values["tile_sample_min_width"] == 128
    assert values["tile_sample_stride_height"] == values["tile_sample_stride_width"] == 96
    assert all(hasattr(vae, name) for name in values)
    for name, value in values.items():
        setattr(vae, name, value)
    vae.use_tiling = True
    with torch.no_grad():
        assert vae.decode(torch.zeros(1, 4, 1, 24, 24)).sample.shape[-2:] == (192, 192)
