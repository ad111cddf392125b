"""Peers: what is not installed says so; what is installed changes an ordinary pipeline as it promises."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch

from diffusers_turbo.bench.bare import make_bare
from diffusers_turbo.bench.cases import builtin_cases
from diffusers_turbo.bench.peers import PEERS
from diffusers_turbo.errors import MissingPackageError, NotSupportedError
from diffusers_turbo.graphs.capture import CAPTURES
from diffusers_turbo.parity import distance
from tests import tiny
from tests.graphs.fake import FakeCapture


@pytest.mark.parametrize("peer", PEERS.values(), ids=lambda peer: peer.name)
def test_peer_is_declared(peer):
    assert peer.source.startswith("https://")
    assert peer.description
    assert (peer.package is None) == (peer.version is None) == (not peer.modules)
    assert any(case.peer == peer.name for case in builtin_cases().values())


@pytest.mark.parametrize("name", [name for name, peer in PEERS.items() if peer.modules])
def test_missing_says_what_to_install(name, monkeypatch):
    absent = tuple(f"no_{module}_here" for module in PEERS[name].modules)
    peer = replace(PEERS[name], modules=absent, package=f"no-{PEERS[name].package}-here")
    assert peer.missing() == f"{' and '.join(absent)} not installed"
    assert peer.installed_version() is None
    pipe = SimpleNamespace()
    with pytest.raises(
        MissingPackageError, match=rf"peer {name}: found no_.*pip install {peer.package}=={peer.version}"
    ):
        peer.apply(pipe)
    assert vars(pipe) == {}


def test_a_package_that_does_not_import_says_so(monkeypatch):
    # there, but made for another release of what it needs
    broken = ModuleType("tomesd")
    broken.__getattr__ = _refuse
    broken.__spec__ = sys.__spec__
    monkeypatch.setitem(sys.modules, "tomesd", broken)
    with pytest.raises(MissingPackageError, match=r"peer tomesd: found ImportError: cannot import name.*pip install"):
        PEERS["tomesd"].apply(tiny.sd())


def _refuse(name):
    raise ImportError(f"cannot import name {name!r}")


@pytest.mark.parametrize("name", [name for name, peer in PEERS.items() if peer.needs_gpu])
def test_offloaders_refuse_the_cpu(name):
    with pytest.raises(
        NotSupportedError, match=rf"peer {name}: found StableDiffusionPipeline on the CPU; needed: a GPU"
    ):
        replace(PEERS[name], modules=()).apply(tiny.sd())


@pytest.mark.parametrize("name", [name for name, peer in PEERS.items() if peer.needs_unet])
def test_peers_for_unets_refuse_transformers(name):
    with pytest.raises(NotSupportedError, match=r"found PixArtAlphaPipeline without a `unet`"):
        replace(PEERS[name], modules=()).apply(tiny.pixart())


def test_mmgp_leaves_the_default_device_as_it_was(monkeypatch):
    # it sets "cuda", here the device that every machine has, for the whole process
    profile_type = SimpleNamespace(LowRAM_LowVRAM=4)
    offload = SimpleNamespace(profile=lambda *_, **__: torch.set_default_device("meta"))
    monkeypatch.setitem(sys.modules, "mmgp", SimpleNamespace(profile_type=profile_type, offload=offload))
    monkeypatch.setitem(sys.modules, "mmgp.offload", offload)
    try:
        PEERS["mmgp"].use(tiny.sd(), torch.device("cuda"), None)
        assert torch.empty(1).device.type == "cpu"
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize(("budget_bytes", "budgets"), [(None, {}), (5 * 2**30, {"budgets": 4096})])
def test_mmgp_is_told_what_its_models_may_take(monkeypatch, budget_bytes, budgets):
    told = []
    offload = SimpleNamespace(profile=lambda pipe, profile, **settings: told.append((profile, settings)))
    mmgp = SimpleNamespace(profile_type=SimpleNamespace(LowRAM_LowVRAM=4), offload=offload)
    monkeypatch.setitem(sys.modules, "mmgp", mmgp)
    monkeypatch.setitem(sys.modules, "mmgp.offload", offload)
    peer = replace(PEERS["mmgp"], modules=())
    peer.apply(tiny.sd(), device=torch.device("cuda"), budget_bytes=budget_bytes)
    assert told == [(4, {**budgets, "quantizeTransformer": False, "verboseLevel": 0})]


def test_an_offloader_computes_where_it_is_told(monkeypatch):
    managed = []
    manager = SimpleNamespace(managed=lambda pipe, device: managed.append(device))
    monkeypatch.setitem(sys.modules, "diffusers_mm", manager)
    # the pipeline waits in host memory
    replace(PEERS["diffusers-mm"], modules=()).apply(tiny.sd(), device=torch.device("cuda"))
    assert managed == [torch.device("cuda")]


def test_a_budget_is_refused_where_there_is_no_setting_for_it():
    peer = replace(PEERS["diffusers-mm"], modules=())
    with pytest.raises(NotSupportedError, match="peer diffusers-mm: found a budget; needed: one of mmgp"):
        peer.apply(tiny.sd(), device=torch.device("cuda"), budget_bytes=2**30)


def test_deepcache_skips_two_of_three_steps():
    pytest.importorskip("DeepCache")
    pipe = tiny.sd()
    plain = tiny.picture(pipe, steps=6)
    middles = []
    pipe.unet.mid_block.register_forward_hook(lambda *_: middles.append(1))
    middle = pipe.unet.mid_block.attentions[0]
    calls = []
    original = middle.forward
    middle.forward = lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs)
    PEERS["deepcache"].apply(pipe)
    changed = tiny.picture(pipe, steps=6)
    assert (len(calls), len(middles)) == (2, 6)
    assert not torch.equal(changed, plain)


def test_tomesd_merges_tokens():
    pytest.importorskip("tomesd")
    pipe = tiny.sd()
    plain = tiny.picture(pipe)
    PEERS["tomesd"].apply(pipe)
    blocks = [module for module in pipe.unet.modules() if type(module).__name__ == "ToMeBlock"]
    tokens = []
    for block in blocks:
        block.attn1.register_forward_pre_hook(lambda _, args: tokens.append(args[0].shape[1]))
    changed = tiny.picture(pipe)
    # half of the 8 x 8 tokens at the top are merged; the 4 x 4 below are left alone
    assert set(tokens) == {32, 16}
    assert not torch.equal(changed, plain)


def test_diffusion_fast_compiles_without_touching_the_process(monkeypatch):
    compiled = []

    def remember(model, **arguments):
        compiled.append((model, arguments))
        return model

    monkeypatch.setattr(torch, "compile", remember)
    before = torch._inductor.config.get_config_copy()
    pipe = tiny.sd()
    PEERS["diffusion-fast"].apply(pipe)
    (unet, _), (decode, _) = compiled
    assert unet is pipe.unet
    # a decorator of diffusers 0.38 gives the method another name
    assert decode.__func__ is type(pipe.vae).decode
    for _, arguments in compiled:
        assert arguments["fullgraph"]
        assert arguments["options"]["max_autotune"]
        assert arguments["options"]["conv_1x1_as_mm"]
    assert torch._inductor.config.get_config_copy() == before
    convolutions = [module.weight for module in pipe.unet.modules() if isinstance(module, torch.nn.Conv2d)]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in convolutions)
    assert any(getattr(module, "fused_projections", False) for module in pipe.unet.modules())
    assert tiny.picture(pipe).isfinite().all()


def test_diffusion_fast_s_options_are_known_to_torch():
    pipe = tiny.sd()
    # torch checks the names here, and compiles at the first call only
    PEERS["diffusion-fast"].apply(pipe)
    assert type(pipe.unet).__name__ == "OptimizedModule"


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_the_bare_prototype_draws_stocks_picture(compiled, monkeypatch):
    monkeypatch.setitem(CAPTURES, "cpu", FakeCapture)
    stock, bare = tiny.sd(), tiny.sd()
    if compiled:
        monkeypatch.setattr(torch.nn.Module, "compile", lambda module: None)
    make_bare(bare, compiled=compiled)
    for seed in range(3):
        assert distance(tiny.picture(bare, seed=seed, steps=4), tiny.picture(stock, seed=seed, steps=4)).psnr_db >= 100
    assert [len(part._compiled_call_impl.graphs) for part in (bare.unet, bare.vae.decoder)] == [1, 1]


def test_the_bare_prototype_leaves_a_vae_that_is_cast_alone():
    bare = tiny.sdxl().to(torch.float16)
    make_bare(bare, compiled=False)
    assert bare.unet._compiled_call_impl is not None
    assert bare.vae.decoder._compiled_call_impl is None
