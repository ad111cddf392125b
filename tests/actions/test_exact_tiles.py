"""Exact tiles: the untiled picture up to rounding, in the memory of a tile, and wrong variants that are told apart."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch._C._dynamo.eval_frame import set_eval_frame
from torch.utils.flop_counter import FlopCounterMode

from diffusers_turbo import turbo
from diffusers_turbo.actions.held_pictures import HeldOnHost
from diffusers_turbo.actions.page_locked import Slab
from diffusers_turbo.actions.tiled_calls import ExactDecode, TiledDecode
from diffusers_turbo.bench.architectures import build
from diffusers_turbo.bench.live_bytes import LiveBytes
from diffusers_turbo.errors import NotSupportedError
from diffusers_turbo.parity import distance
from diffusers_turbo.tiling import exact, halves
from diffusers_turbo.tiling.exact import Settled
from diffusers_turbo.tiling.halves import largest_held, stretches_of
from diffusers_turbo.tiling.pictures import OnDevice, OnHost, has_channels_last
from diffusers_turbo.tiling.statistics import normed_by
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


def decoded(vae, latents, tile, hold_on="device"):
    with torch.no_grad():
        return ExactDecode(vae, tile, HeldOnHost() if hold_on == "host" else None)(latents).sample


@pytest.mark.parametrize("hold_on", ["device", "host"])
@pytest.mark.parametrize("tile", [32, 72, 128, 512])
def test_tiles_of_any_size_give_the_untiled_picture(emoji, tile, hold_on):
    vae, latents, untiled = emoji
    assert psnr(decoded(vae, latents, tile, hold_on), untiled) > 130


@pytest.mark.parametrize("hold_on", ["device", "host"])
def test_tiles_are_laid_out_as_the_middle_leaves_them(emoji, hold_on, monkeypatch):
    vae, latents, untiled = emoji
    seen = set()

    def apply(self, input):
        seen.add(has_channels_last(input))
        return normed_by(self.per_channel, input, self.norm.eps)

    monkeypatch.setattr(Settled, "apply", apply)
    assert psnr(decoded(vae, latents, 64, hold_on), untiled) > 130
    assert seen == {False}
    seen.clear()
    vae.to(memory_format=torch.channels_last)
    try:
        assert psnr(decoded(vae, latents, 64, hold_on), untiled) > 130
    finally:
        vae.to(memory_format=torch.contiguous_format)
    assert seen == {True}


def test_memory_of_the_host_serves_the_next_decode_and_two_at_once(emoji):
    vae, latents, _ = emoji
    decode = ExactDecode(vae, 64, HeldOnHost())
    with torch.inference_mode():
        first = decode(latents).sample
    slabs = list(decode.held._free[0].slabs)
    # three levels of 24x32 latents: 64, 32 and 16 channels
    assert {len(slab) for slab in slabs} == {largest_held(vae.decoder, latents)}
    with torch.no_grad():
        assert torch.equal(decode(latents).sample, first)
        assert set(map(id, decode.held._free[0].slabs)) == set(map(id, slabs))
        with decode.held.lent(latents.device, 0):
            assert torch.equal(decode(latents).sample, first)
        assert len(decode.held._free) == 2
        # a larger picture has larger ones
        decode(latents.repeat(1, 1, 2, 1))
    assert max(len(slab) for slab in decode.held._free[-1].slabs) == 2 * len(slabs[0])


def test_copies_of_a_pipeline_make_memory_of_their_own(emoji):
    vae, latents, _ = emoji
    decode = ExactDecode(vae, 64, HeldOnHost())
    with torch.no_grad():
        first = decode(latents).sample
        for twin in (copy.deepcopy(decode), pickle.loads(pickle.dumps(decode))):
            assert twin.held._free == []
            assert torch.equal(twin(latents).sample, first)
    assert len(decode.held._free) == 1


@pytest.mark.parametrize(
    "why", ["the system refused: no", "half of what is free of host memory is less than a picture"]
)
def test_where_pages_cannot_be_locked_it_says_so(monkeypatch, why):
    def refuse(slab, device):
        raise RuntimeError("no")

    pipe = turbo(tiny.sd())
    stock = tiny.picture(pipe, height=96, width=96)
    monkeypatch.setattr("diffusers_turbo.actions.held_pictures.can_pin", lambda device: True)
    monkeypatch.setattr(Slab, "lock", refuse)
    if why.startswith("half"):
        monkeypatch.setattr("diffusers_turbo.actions.held_pictures.host_memory", lambda: (2**30, 2**10))
    pipe.enable_vae_exact_tiling(tile_size=32, hold_on="host")
    assert psnr(tiny.picture(pipe, height=96, width=96), stock) > 120
    assert f"they wait in ordinary memory, which is slower to copy: {why}" in str(pipe.turbo_report())


def test_lossy_tiles_and_wrong_variants_are_far_from_it(emoji, monkeypatch):
    vae, latents, untiled = emoji
    vae.tile_latent_min_size, vae.tile_sample_min_size, vae.tile_overlap_factor = 8, 64, 0.25
    with torch.no_grad():
        assert psnr(TiledDecode(vae, 8)(latents).sample, untiled) < 60
    short = [dataclasses.replace(each, reach=each.reach - 1) for each in stretches_of(vae.decoder)]
    with monkeypatch.context() as patch:
        patch.setattr(halves, "stretches_of", lambda decoder: short)  # tiles that see a pixel too few
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
        settled.own = rows
        with pytest.raises(exact._Measured):
            settled.measure(picture)
    settled.settle()
    tolerance = {torch.float32: 1e-4, torch.float64: 1e-9, torch.bfloat16: 0.1}[dtype]
    assert torch.allclose(settled.apply(picture), norm(picture), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("hold_on", ["device", "host"])
def test_the_switch_decodes_pictures_above_a_tile_and_is_undone(hold_on):
    pipe = turbo(tiny.sd())
    stock, before = tiny.picture(pipe, batch=2, height=96, width=128), state_of(pipe)
    pipe.enable_vae_exact_tiling(tile_size=32, hold_on=hold_on)
    assert psnr(tiny.picture(pipe, batch=2, height=96, width=128), stock) > 120
    report = pipe.turbo_report()
    assert report.exact
    assert ("of host memory are kept for the pictures of the next call" in str(report)) == (hold_on == "host")
    assert "pictures above 32 px a side are decoded and encoded in tiles" in str(report)
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
@pytest.mark.parametrize(("make", "hold_on"), [(tiny.sd, "device"), (tiny.sdxl, "device"), (tiny.sdxl, "host")])
def test_beside_other_switches(make, hold_on, switches):
    pipe = turbo(make())
    stock = tiny.picture(pipe, height=96, width=96)
    for action, given in switches:
        getattr(pipe, action)(**given)
    pipe.enable_vae_exact_tiling(tile_size=32, hold_on=hold_on)
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
    assert "the VAE worked as a whole, since offload moves" in str(pipe.turbo_report())


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


@pytest.mark.parametrize("watched", [None, False], ids=["plain", "callers keep arguments"])
def test_the_middle_s_result_is_gone_before_the_end(emoji, watched):
    vae, latents, _ = emoji
    results, there = [], []
    handles = [
        vae.decoder.mid_block.register_forward_hook(lambda module, given, result: results.append(weakref.ref(result))),
        vae.decoder.conv_out.register_forward_pre_hook(lambda *_: there.append(results[-1]() is not None)),
    ]
    before = set_eval_frame(watched)
    try:
        decoded(vae, latents, 64)
    finally:
        set_eval_frame(before)
        for handle in handles:
            handle.remove()
    assert there
    assert not any(there)


@pytest.mark.parametrize("hold_on", ["device", "host"])
@pytest.mark.parametrize(("tile", "width"), [(32, 256), (64, 256), (48, 200)])
def test_moments_are_those_of_the_whole_picture(emoji, tile, width, hold_on, monkeypatch):
    vae, _, _ = emoji
    picture = seams.sheet(4, 5, 256)[:, :, :136, :width]
    with torch.no_grad():
        whole = vae.encode(picture).latent_dist.mean
    pipe = turbo(tiny.sd())
    pipe.vae = vae
    pipe.enable_vae_exact_tiling(tile_size=tile, hold_on=hold_on)
    try:
        with torch.no_grad():
            tiled = vae.encode(picture).latent_dist.mean
            assert (tiled - whole).square().mean().sqrt() < 1e-6 * whole.std()
            short = [dataclasses.replace(each, reach=each.reach - 1) for each in stretches_of(vae.encoder)]
            monkeypatch.setattr(halves, "stretches_of", lambda encoder: short)
            wrong = vae.encode(picture).latent_dist.mean
            assert (wrong - whole).square().mean().sqrt() > 1e-4 * whole.std()
    finally:
        pipe.turbo_undo()


def test_an_encoder_that_is_not_known_works_on_whole_pictures():
    vae = turbo(tiny.sd()).vae
    picture = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    pipe = turbo(tiny.sd())
    pipe.vae = vae
    vae.encoder.conv_norm_out = nn.Identity()
    with torch.no_grad():
        whole = vae.encode(picture).latent_dist.mean
        pipe.enable_vae_exact_tiling(tile_size=32)
        assert torch.equal(vae.encode(picture).latent_dist.mean, whole)


@pytest.mark.parametrize("rows", [5, 64])
def test_a_picture_whose_rows_are_no_whole_steps_is_halved_at_once(rows):
    (halving,) = [each for each in stretches_of(tiny.vae().encoder) if each.down == 2][:1]
    x = torch.randn(1, halving.channels, rows, 64)
    with torch.no_grad():
        whole = halving(x)
        tiled = halving.in_tiles(OnDevice(x), 8, OnDevice.like)
    assert (len(halving.strips(rows, 64, 8)) == 1) == (rows == 5)
    assert torch.allclose(tiled.rows(0, tiled.height), whole, atol=1e-6)


@pytest.mark.parametrize(("hold_on", "share"), [("device", 2), ("host", 4)])
def test_a_tile_is_all_that_is_there(hold_on, share):
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
    tiled = [peak(lambda tile=tile: decoded(vae, latents, tile, hold_on)) for tile in (256, 128, 64)]
    assert sorted(tiled, reverse=True) == tiled
    assert tiled[-1] < whole / share


@pytest.fixture(scope="module")
def full_size():
    return build("sdxl", dtype=torch.float16, device="meta", text_encoders=False).vae


@pytest.mark.parametrize("side", [512, 1024, 2048])
def test_the_work_is_twice_a_decode(full_size, side):
    latents = torch.empty(1, 4, side // 8, side // 8, device="meta", dtype=torch.float16)

    def operations(decode):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            decode()
        return counter.get_total_flops()

    whole = operations(lambda: full_size.decoder(latents))
    for hold_on in ("device", "host"):
        tiled = operations(lambda hold_on=hold_on: decoded(full_size, latents, 256, hold_on))
        assert tiled / whole == pytest.approx(2, rel=0.15)


@pytest.mark.parametrize("side", [1024, 2048])
def test_what_goes_to_the_host_and_back(full_size, side, monkeypatch):
    """Statistics of a picture are taken as it is made, so that it comes back once less."""
    moved = []
    rows, put = OnHost.rows, OnHost.put

    def counted(self, first, last):
        found = rows(self, first, last)
        moved.append(found.numel())
        return found

    monkeypatch.setattr(OnHost, "rows", counted)
    monkeypatch.setattr(
        OnHost, "put", lambda self, first, given: moved.append(given.numel()) or put(self, first, given)
    )
    decoded(full_size, torch.empty(1, 4, side // 8, side // 8, device="meta", dtype=torch.float16), 256, "host")
    assert 2000 < sum(moved) / side**2 < 2250


def test_autoencoders_it_does_not_know_are_refused():
    pipe = turbo(tiny.sd())
    pipe.vae.decoder.conv_norm_out = nn.Identity()
    with pytest.raises(
        NotSupportedError, match=r"enable_vae_exact_tiling\(tile_size=256, hold_on='device'\): found a Identity"
    ):
        pipe.enable_vae_exact_tiling()
    assert not pipe.vae.use_tiling
