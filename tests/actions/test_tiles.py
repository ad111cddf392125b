"""AutoencoderKL's tiles: no seams, nearer to the untiled decode than diffusers', one size, nothing left behind."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn

from diffusers_turbo import turbo
from diffusers_turbo.actions.tiled_calls import TiledDecode, TiledEncode
from diffusers_turbo.parity import distance
from diffusers_turbo.tiling.canvas import Grid
from diffusers_turbo.tiling.grid import Axis
from diffusers_turbo.tiling.hosts import takes_our_tiles
from diffusers_turbo.tiling.statistics import poolable
from tests import seams, tiny
from tests.seams import our_edges, seam_excess, stock_edges
from tests.state import differences, state_of

TILE, SIDE = 16, 256

canvas = Grid.canvas


@pytest.fixture(scope="module")
def emoji():
    """VAE, latents `[1, 4, 32, 32]` of one enlarged emoji, and their untiled decode."""
    vae = seams.load_vae()
    latents = seams.latents_of(vae, seams.sheet(1, 1, SIDE))
    with torch.no_grad():
        return vae, latents, vae.decode(latents).sample


@torch.no_grad()
def decoded(vae, latents, decode, overlap=0.25):
    vae.tile_latent_min_size, vae.tile_sample_min_size, vae.tile_overlap_factor = TILE, TILE * 8, overlap
    return decode(latents).sample


def test_less_seam_and_nearer_to_the_untiled_decode_than_diffusers(emoji):
    vae, latents, untiled = emoji
    ours = decoded(vae, latents, TiledDecode(vae, 8))
    stock = decoded(vae, latents, vae.tiled_decode)
    ours_excess = seam_excess(ours, untiled, our_edges(SIDE // 8, TILE, 0.25))
    stock_excess = seam_excess(stock, untiled, stock_edges(SIDE // 8, TILE, 0.25))
    # measured (docs/benchmarks/tiling.json): 0.99 and 2.01; 43.3 and 36.0 dB
    assert 0.95 < ours_excess < 1.05 < 1.5 < stock_excess
    assert distance(ours / 2, untiled / 2).psnr_db > distance(stock / 2, untiled / 2).psnr_db + 5


def test_a_hard_cut_is_seen_by_the_seam_figure(emoji):
    vae, latents, untiled = emoji
    cut = decoded(vae, latents, TiledDecode(vae, 8), overlap=0.0)
    assert seam_excess(cut, untiled, our_edges(SIDE // 8, TILE, 0.0)) > 2


def test_tiles_cover_an_axis_with_one_size_and_weights_that_sum_to_one():
    for length, tile, part in itertools.product((1, 5, 8, 9, 16, 17, 29, 40, 63, 480), (4, 16), (0, 1, 4, 8)):
        overlap = min(part, tile // 2)
        axis = Axis(length, tile, overlap)
        spans = list(axis.spans())
        assert spans[0][0] == 0
        assert spans[-1][1] == length
        assert {end - start for start, end, _ in spans} == {min(tile, length)}
        assert all(end - following >= overlap for _, end, following in spans[:-1])
        assert all(start < following for start, _, following in spans)
        total = torch.zeros(2 * length)
        for (start, end, _), weight in zip(spans, axis.feathers(2), strict=True):
            assert weight.min() >= 0
            total[2 * start : 2 * end] += weight
        assert torch.allclose(total, torch.ones_like(total), atol=1e-6)


@pytest.mark.parametrize(("height", "width"), [(72, 136), (64, 40), (200, 24)])
def test_any_size_and_every_tile_the_same(height, width):
    pipe = turbo(tiny.sd())
    untiled = tiny.picture(pipe, height=height, width=width, batch=2)
    pipe.enable_vae_tiling(tile_size=48)
    shapes = set()
    pipe.vae.decoder.register_forward_pre_hook(lambda module, args: shapes.add(tuple(args[0].shape)))
    tiled = tiny.picture(pipe, height=height, width=width, batch=2)
    assert shapes == {(1, 4, min(6, height // 8), min(6, width // 8))}
    assert tiled.shape == untiled.shape
    assert distance(tiled, untiled).psnr_db > 20


@torch.no_grad()
def test_pictures_of_a_batch_do_not_see_each_other():
    pipe = turbo(tiny.sd())
    pipe.enable_vae_tiling(tile_size=32)
    latents = torch.randn(3, 4, 9, 11, generator=torch.Generator().manual_seed(0))
    together = pipe.vae.decode(latents).sample
    assert torch.equal(together, torch.cat([pipe.vae.decode(each).sample for each in latents.split(1)]))


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"use_quant_conv": False, "use_post_quant_conv": False}])
def test_encoding_keeps_the_shape_where_pixels_do_not_make_whole_latents(options):
    pipe = turbo(tiny.sd(**options))
    picture = torch.randn(1, 3, 100, 140, generator=torch.Generator().manual_seed(0))
    whole = pipe.vae.encode(picture).latent_dist.mean
    pipe.enable_vae_tiling(tile_size=64)
    assert isinstance(pipe.vae._tiled_encode, TiledEncode)
    tiled = pipe.vae.encode(picture).latent_dist.mean
    assert tiled.shape == whole.shape == (1, 4, 12, 17)
    assert not torch.equal(tiled, whole)


@torch.no_grad()
def test_encoding_is_nearer_to_untiled_than_diffusers(emoji):
    vae, whole, _ = emoji
    picture = seams.sheet(1, 1, SIDE)
    vae.tile_latent_min_size, vae.tile_sample_min_size, vae.tile_overlap_factor = TILE, TILE * 8, 0.25
    ours, stock = (encode(picture)[:, :4] for encode in (TiledEncode(vae, 8), vae._tiled_encode))
    assert (ours - whole).norm() < 0.8 * (stock - whole).norm()


@torch.no_grad()
def test_norms_of_the_whole_picture_where_a_tile_is_the_whole_picture():
    """One tile that covers everything has the statistics of everything: then tiling is exact."""
    vae = tiny.vae()
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    vae.tile_latent_min_size = 8
    tiled = TiledDecode(vae, 8)(latents).sample
    assert torch.allclose(tiled, vae.decode(latents).sample, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_canvas_has_the_decoders_dtype(dtype):
    vae = tiny.vae().to(dtype)
    vae.tile_latent_min_size = 4
    latents = torch.randn(1, 4, 9, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert TiledDecode(vae, 8)(latents).sample.dtype == dtype
    (plain,) = TiledDecode(vae, 8)(latents, return_dict=False)
    assert torch.isfinite(plain).all()


@torch.no_grad()
def test_the_canvas_is_there_before_the_first_tile(monkeypatch):
    """One made after it would lie in what tiles left behind, and keep it from being given back."""
    vae = tiny.vae()
    latents, made = torch.randn(1, 4, 32, 32), []
    monkeypatch.setattr(Grid, "canvas", lambda *given: made.append(given) or canvas(*given))
    vae.decoder.register_forward_pre_hook(lambda *_: made.append("tile"))
    decode = TiledDecode(vae, 8)
    plain = decoded(vae, latents, decode)
    assert [item == "tile" for item in made[:2]] == [False, True]
    assert sum(item != "tile" for item in made) == 1
    grid = decode._grid(latents, decodes=True)
    made.clear()
    with torch.autocast("cpu", torch.bfloat16):
        assert decoded(vae, latents, decode).dtype == torch.bfloat16
    assert sum(item != "tile" for item in made) == 1
    # one that does not suit is left aside
    wrong = canvas(grid, latents, 3, torch.float64)
    run = lambda tile: vae.decoder(vae.post_quant_conv(tile))  # noqa: E731
    assert torch.equal(grid.paint(run, latents, wrong), grid.paint(run, latents))
    assert plain.dtype == torch.float32


@torch.no_grad()
def test_a_decoder_of_ones_own_is_tiled_too():
    vae = tiny.vae()
    latents, own = torch.randn(1, 4, 32, 32), vae.decoder
    expected = decoded(vae, latents, TiledDecode(vae, 8))

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = own

        def forward(self, x):
            return self.inner(x)

    vae.decoder = Own()
    assert torch.equal(decoded(vae, latents, TiledDecode(vae, 8)), expected)


def test_nothing_is_left_behind_after_a_decode_that_fails():
    pipe = turbo(tiny.sd())
    before = state_of(pipe)
    pipe.enable_vae_tiling(tile_size=32)
    calls = itertools.count()

    def fail(module, args):
        # among the tiles that are painted, after all were measured
        if next(calls) == 5:
            raise RuntimeError("injected")

    handle = pipe.vae.decoder.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="injected"):
        tiny.picture(pipe)
    handle.remove()
    pipe.disable_vae_tiling()
    left = [each for each in differences(before, state_of(pipe)) if not each.startswith("scheduler")]
    assert [each for each in left if "vae" in each] == []


def test_copies_decode_by_themselves():
    pipe = turbo(tiny.sd())
    pipe.enable_vae_tiling(tile_size=32)
    stock = tiny.picture(pipe)
    for made in (copy.deepcopy(pipe.vae), pickle.loads(pickle.dumps(pipe.vae))):
        assert made.tiled_decode.vae is made
        pipe.vae = made
        assert torch.equal(tiny.picture(pipe), stock)


def test_norms_whose_weights_come_and_go_keep_their_own_statistics():
    """Leaf by leaf offload gives each norm its weights for its own forward only."""
    pipe = turbo(tiny.sd())
    pipe.enable_vae_tiling(tile_size=32)
    pipe.enable_group_offload(onload_device="cpu", offload_type="leaf_level")
    assert poolable(pipe.vae.decoder) == []
    offloaded = tiny.picture(pipe)
    assert "tiles were normalised each by itself" in str(pipe.turbo_report())
    pipe.disable_offload()
    tiny.picture(pipe)
    assert "tiles were normalised each by itself" not in str(pipe.turbo_report())
    assert len(poolable(pipe.vae.decoder)) > 10
    assert 15 < distance(offloaded, tiny.picture(pipe)).psnr_db < 90


def test_subclasses_with_tiles_of_their_own_keep_them():
    vae = tiny.vae()
    assert takes_our_tiles(vae)

    class Other(type(vae)):
        def tiled_decode(self, z, return_dict=True):
            return super().tiled_decode(z, return_dict)

    vae.__class__ = Other
    assert not takes_our_tiles(vae)
