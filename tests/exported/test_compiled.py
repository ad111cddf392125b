"""The real thing: one UNet through torch.export, Inductor and g++, and every weight of it changed afterwards."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from diffusers_turbo import turbo
from diffusers_turbo.actions.unet_inputs import TensorsOnly, example_inputs, relative_distance
from diffusers_turbo.exported import package
from diffusers_turbo.exported.program import bounds_for, export_program
from diffusers_turbo.facts.host import cxx_compiler
from diffusers_turbo.parity import distance
from tests import tiny

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(cxx_compiler() is None, reason="AOTInductor compiles its code with a C++ compiler"),
]

QUICK_TO_COMPILE = {"aot_inductor.compile_wrapper_opt_level": "O0", "aot_inductor.precompile_headers": False}


def small_xl():
    """An SDXL pipeline whose UNet has three residual blocks and one attention layer. Its norms are all ones."""
    pipe = tiny.sdxl()
    torch.manual_seed(0)
    pipe.unet = tiny.unet(
        block_out_channels=(16,),
        down_block_types=("CrossAttnDownBlock2D",),
        mid_block_type=None,
        up_block_types=("UpBlock2D",),
        cross_attention_dim=2 * tiny.CONTEXT,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=tiny.CONTEXT + 6 * 8,
    )
    return pipe


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """One compiled package for all tests of this file."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(package, "SETTINGS", {**package.SETTINGS, **QUICK_TO_COMPILE})
        return turbo(small_xl()).export_unet(tmp_path_factory.mktemp("export") / "unet.pt2")


@pytest.fixture
def twins(path):
    """Two equal pipelines, one with the compiled UNet."""
    ours, plain = turbo(small_xl()), small_xl()
    ours.load_exported_unet(path)
    return SimpleNamespace(ours=ours, plain=plain)


@pytest.mark.parametrize(("batch", "height", "width"), [(1, 64, 64), (3, 64, 64), (1, 128, 96), (2, 56, 200)])
def test_other_sizes_batches_and_no_guidance(twins, batch, height, width):
    for changes in ({}, {"guidance_scale": 1.0}):
        pictures = [
            tiny.picture(pipe, batch=batch, height=height, width=width, **changes) for pipe in (twins.ours, twins.plain)
        ]
        assert distance(*pictures).psnr_db >= 90
    told = str(twins.ours.turbo_report())
    assert "4 calls as exported" in told
    assert "eagerly" not in told


@torch.no_grad()
def change_all(pipe):
    """Another value for every single weight, those with uniform values and those of four elements included."""
    generator = torch.Generator().manual_seed(1)
    for weight in pipe.unet.parameters():
        weight.mul_(1.5).add_(torch.randn(weight.shape, generator=generator), alpha=0.02)


def exchange_all(pipe):
    for weight in pipe.unet.parameters():
        weight.data = weight.data.clone()
    change_all(pipe)


@pytest.mark.parametrize("change", [change_all, exchange_all])
def test_every_weight_is_the_pipelines_own(twins, change):
    stock = tiny.picture(twins.ours)
    for pipe in (twins.ours, twins.plain):
        change(pipe)
    wanted = tiny.picture(twins.plain)
    assert distance(wanted, stock).psnr_db < 60
    assert distance(tiny.picture(twins.ours), wanted).psnr_db >= 90
    assert "4 calls as exported" in str(twins.ours.turbo_report())


def test_code_holds_no_weights_and_keeps_none_alive(twins, path):
    """Left to torch, a package holds the weights' bytes, and what was bound once is never freed."""
    weight = twins.ours.unet.conv_in.weight
    old = StorageWeakRef(weight.untyped_storage())
    alive = []

    def exchange(pipe, step, timestep, tensors):
        if step == 0:
            weight.data = weight.data.clone()
        alive.append(not old.expired())
        return tensors

    tiny.picture(twins.ours, steps=2, callback_on_step_end=exchange)
    assert alive == [True, True], "the code would have read freed memory in the second step"
    assert old.expired(), "the weight's old memory was kept after the call"
    data = path.read_bytes()
    assert weight.data.numpy().tobytes()[:256] not in data
    twins.ours.unload_exported_unet()
    assert "_compiled_call_impl" not in vars(twins.ours.unet)


def test_loading_compiles_nothing(path, monkeypatch):
    """torch's own way to load a package finds out the CPU's instruction sets by compiling test programs."""
    monkeypatch.setattr("torch._inductor.cpu_vec_isa.pick_vec_isa", lambda: pytest.fail("a test program was compiled"))
    pipe = turbo(small_xl())
    pipe.load_exported_unet(path)
    tiny.picture(pipe)
    assert "2 calls as exported" in str(pipe.turbo_report())


def test_two_levels_of_stable_diffusion_are_exported_for_every_size():
    """Without Inductor: the constraints of a UNet that halves its latent, and one input less than SDXL's."""
    unet = tiny.sd().unet
    sample, timestep, context = example_inputs(unet, None, None, 1)
    inputs = (sample, timestep.float().repeat(2), context)
    bounds = bounds_for(inputs, (32, 64), dynamic=True)
    assert (bounds.multiple, bounds.height) == (2, [4, 1024])
    program = export_program(TensorsOnly(unet), inputs, bounds, dynamic=True).module()
    for rows, height, width, tokens in ((1, 4, 6, 2), (3, 8, 20, 154)):
        other = (
            torch.randn(rows, 4, height, width),
            torch.full((rows,), 3.0),
            torch.randn(rows, tokens, tiny.CONTEXT),
        )
        assert relative_distance(unet, program, other) < 1e-6
    static = bounds_for(inputs, (32, 64), dynamic=False)
    assert static.reasons_against(*(torch.empty(shape) for shape in ((2, 4, 8, 8), (2, 77, tiny.CONTEXT))), []) == []
    assert static.reasons_against(*(torch.empty(shape) for shape in ((4, 4, 8, 8), (4, 77, tiny.CONTEXT))), []) != []
