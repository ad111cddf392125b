"""Exact tiles: the untiled picture up to rounding, in the memory of a tile, and wrong variants that are told apart."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from diffusers_turbo import turbo
from diffusers_turbo.actions.tiled_calls import TiledDecode
from diffusers_turbo.bench.live_bytes import LiveBytes
from diffusers_turbo.errors import NotSupportedError
from diffusers_turbo.parity import distance
from diffusers_turbo.tiling import exact
from diffusers_turbo.tiling.exact import Settled, decode_in_tiles, stretches_of
from tests import seams, tiny
from tests.state import differences, state_of


@pytest.fixture(scope="module")
def emoji():
    """VAE, latents `[1, 4, 24, 32]`, and their untiled decode."""
    vae = seams.load_vae()
    with torch.no_grad():
        latents = seams.latents_of(vae, seams.sheet(4, 5, 256))[:, :, :24]
        return vae, latents, vae.decode(latents).sample


def psnr(ours, theirs):
    return distance(ours / 2, theirs / 2).psnr_db


def decoded(vae, latents, tile):
    with torch.no_grad():
        return decode_in_tiles(vae.decoder, vae.post_quant_conv(latents), tile)


@pytest.mark.parametrize("tile", [32, 72, 128, 512])
def test_tiles_of_any_size_give_the_untiled_picture(emoji, tile):
    vae, latents, untiled = emoji
    assert psnr(decoded(vae, latents, tile), untiled) > 130


def test_lossy_tiles_and_wrong_variants_are_far_from_it(emoji, monkeypatch):
    vae, latents, untiled = emoji
    vae.tile_latent_min_size, vae.tile_sample_min_size, vae.tile_overlap_factor = 8, 64, 0.25
    with torch.no_grad():
        assert psnr(TiledDecode(vae, 8)(latents).sample, untiled) < 60
    short = [dataclasses.replace(each, reach=each.reach - 2) for each in stretches_of(vae.decoder)]
    with monkeypatch.context() as patch:
        patch.setattr(exact, "stretches_of", lambda decoder: short)  # tiles that see two pixels too few
        assert psnr(decoded(vae, latents, 64), untiled) < 90
    settle = Settled.settle

    def of_one_tile(self):
        del self.seen[1:]
        settle(self)

    with monkeypatch.context() as patch:
        patch.setattr(Settled, "settle", of_one_tile)
        assert psnr(decoded(vae, latents, 64), untiled) < 60
    assert psnr(decoded(vae, latents, 64), untiled) > 130


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_settled_statistics_are_those_of_the_whole(dtype):
    norm = nn.GroupNorm(4, 16).to(dtype)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    picture = (torch.randn(1, 16, 20, 24, generator=torch.Generator().manual_seed(0)) * 3 + 100).to(dtype)
    settled = Settled(norm)
    for rows in (slice(0, 7), slice(7, 20)):
        for columns in (slice(0, 24),):
            settled.core = (rows, columns)
            with pytest.raises(exact._Measured):
                settled.measure(picture)
    settled.settle()
    tolerance = {torch.float32: 1e-4, torch.float64: 1e-9, torch.bfloat16: 0.1}[dtype]
    assert torch.allclose(settled.apply(picture), norm(picture), atol=tolerance, rtol=tolerance)


def test_the_switch_decodes_pictures_above_a_tile_and_is_undone():
    pipe = turbo(tiny.sd())
    stock, before = tiny.picture(pipe, batch=2, height=96, width=128), state_of(pipe)
    pipe.enable_vae_exact_tiling(tile_size=32)
    assert psnr(tiny.picture(pipe, batch=2, height=96, width=128), stock) > 120
    report = pipe.turbo_report()
    assert report.exact
    assert "pictures above 32 px a side are decoded in tiles; encoding stays whole" in str(report)
    pipe.disable_vae_exact_tiling()
    assert differences(before, state_of(pipe)) == []
    assert torch.equal(tiny.picture(pipe, batch=2, height=96, width=128), stock)


def test_it_takes_the_place_of_lossy_tiles_and_gives_it_back():
    pipe = turbo(tiny.sd())
    pipe.enable_vae_tiling(tile_size=64)
    pipe.enable_vae_exact_tiling(tile_size=32)
    assert pipe.turbo_report().exact
    pipe.disable_vae_exact_tiling()
    assert pipe.vae.use_tiling
    assert isinstance(pipe.vae.tiled_decode, TiledDecode)


@pytest.mark.parametrize(
    "switches",
    [
        [("enable_channels_last", {})],
        [("enable_fused_kernels", {}), ("enable_channels_last", {}), ("enable_pointwise_matmul", {})],
        [("fuse_qkv_projections", {})],
        [("enable_partial_offload", {"resident_bytes": 0, "device": "cpu:0"})],
        [("enable_partial_offload", {"resident_bytes": 0, "by_layers": ["vae"], "device": "cpu:0"})],
        [("enable_model_cpu_offload", {"device": "cpu"})],
        [("enable_memory_fallback", {})],
    ],
    ids=lambda switches: "+".join(name for name, _ in switches),
)
@pytest.mark.parametrize("make", [tiny.sd, tiny.sdxl])
def test_beside_other_switches(make, switches):
    pipe = turbo(make())
    stock = tiny.picture(pipe, height=96, width=96)
    for action, given in switches:
        getattr(pipe, action)(**given)
    pipe.enable_vae_exact_tiling(tile_size=32)
    for _ in range(2):
        assert psnr(tiny.picture(pipe, height=96, width=96), stock) > 90
    assert "as a whole" not in str(pipe.turbo_report())
    pipe.turbo_undo()
    assert torch.equal(tiny.picture(pipe, height=96, width=96), stock)


def test_where_the_norms_weights_come_and_go_it_decodes_as_a_whole_and_says_so():
    pipe = turbo(tiny.sd())
    stock = tiny.picture(pipe, height=96, width=96)
    pipe.enable_group_offload(onload_device="cpu", offload_type="leaf_level")
    pipe.enable_vae_exact_tiling(tile_size=32)
    assert psnr(tiny.picture(pipe, height=96, width=96), stock) > 120
    assert "the VAE decoded as a whole, since offload moves" in str(pipe.turbo_report())


def test_an_error_inside_leaves_the_norms_as_they_were():
    pipe = turbo(tiny.sd())
    stock = tiny.picture(pipe, height=96, width=96)
    pipe.enable_vae_exact_tiling(tile_size=32)
    before = state_of(pipe)
    failing = pipe.vae.decoder.conv_out.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tiny.picture(pipe, height=96, width=96)
    failing.remove()
    assert differences(before, state_of(pipe)) == []
    assert psnr(tiny.picture(pipe, height=96, width=96), stock) > 120


def test_encoding_stays_whole():
    vae = turbo(tiny.sd()).vae
    picture = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = vae.encode(picture).latent_dist.mean
        pipe = turbo(tiny.sd())
        pipe.vae = vae
        pipe.enable_vae_exact_tiling(tile_size=32)
        assert torch.equal(vae.encode(picture).latent_dist.mean, whole)


def test_a_tile_is_all_that_is_there():
    """Of activations, counted on the CPU, beside the pictures between stretches."""
    vae = tiny.vae()
    latents = torch.zeros(1, 4, 64, 64)

    def peak(decode):
        with torch.no_grad(), LiveBytes() as memory:
            decode()
        return memory.peak

    # the middle's attention is over the whole picture
    vae.decoder.mid_block.attentions[0] = None
    whole = peak(lambda: vae.decode(latents))
    tiled = [peak(lambda tile=tile: decoded(vae, latents, tile)) for tile in (256, 128, 64)]
    assert sorted(tiled, reverse=True) == tiled
    assert tiled[-1] < whole / 3


def test_autoencoders_it_does_not_know_are_refused():
    pipe = turbo(tiny.sd())
    pipe.vae.decoder.conv_norm_out = nn.Identity()
    with pytest.raises(NotSupportedError, match=r"enable_vae_exact_tiling\(tile_size=256\): found a Identity"):
        pipe.enable_vae_exact_tiling()
    assert not pipe.vae.use_tiling
