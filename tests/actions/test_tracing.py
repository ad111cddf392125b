"""The trace: right at sizes and batches that were not traced, saved and loaded, and never silently out of date."""

from __future__ import annotations

import inspect

import pytest
import torch
from peft import LoraConfig

from diffusers_turbo import TurboError, turbo
from diffusers_turbo.parity import distance
from tests import tiny
from tests.state import differences, state_of

pytestmark = pytest.mark.filterwarnings(
    # torch announces the end of TorchScript whenever one is called, saved or loaded
    "ignore:`torch.jit:DeprecationWarning"
)


@pytest.fixture(scope="module", params=["contiguous", "channels-last"])
def layout(request):
    return request.param


@pytest.fixture(scope="module", params=[tiny.sd, tiny.sdxl], ids=["sd", "sdxl"])
def twins(request, layout):
    """Two equal pipelines, the first with one trace for all sizes."""
    traced, plain = turbo(request.param()), request.param()
    if layout == "channels-last":
        traced.enable_channels_last()
    traced.trace_unet()
    return traced, plain


@pytest.mark.parametrize(("batch", "height", "width"), [(1, 64, 64), (3, 64, 64), (1, 96, 64), (2, 128, 96)])
def test_other_sizes_and_batches(twins, batch, height, width):
    traced, stock = (tiny.picture(pipe, batch=batch, height=height, width=width) for pipe in twins)
    assert distance(traced, stock).psnr_db >= 90


def test_return_dict_both_ways_and_signature_kept():
    pipe = turbo(tiny.sd())
    inputs = (torch.randn(2, 4, 8, 8), 7, torch.randn(2, 5, tiny.CONTEXT))
    signature = inspect.signature(pipe.unet.forward)
    with torch.no_grad():
        eager = pipe.unet(*inputs).sample
        pipe.trace_unet()
        assert inspect.signature(pipe.unet.forward) == signature
        torch.testing.assert_close(pipe.unet(*inputs).sample, eager, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(pipe.unet(*inputs, return_dict=False)[0], eager, atol=1e-5, rtol=1e-4)


def test_a_trace_that_runs_at_one_size_only_is_refused_in_one_line():
    pipe = turbo(tiny.sd())
    before = state_of(pipe)
    wide, base = pipe.unet.mid_block, type(pipe.unet.mid_block)

    class OneSize(base):
        def forward(self, hidden_states, *args, **kwargs):
            sizes = [int(size) for size in hidden_states.shape]
            return super().forward(hidden_states.view(sizes), *args, **kwargs)

    wide.__class__ = OneSize
    with pytest.raises(TurboError, match=r"a trace that does not run .* that were not traced \(RuntimeError: shape "):
        pipe.trace_unet()
    wide.__class__ = base
    assert differences(before, state_of(pipe)) == []


def test_save_and_load(tmp_path):
    path = str(tmp_path / "unet.pt")
    pipe = turbo(tiny.sd())
    stock = tiny.picture(pipe)
    pipe.trace_unet(save_path=path)
    other = turbo(tiny.sd())
    other.trace_unet(load_path=path)
    assert distance(tiny.picture(other), stock).psnr_db >= 90


def test_a_trace_of_another_unet_is_refused(tmp_path):
    path = str(tmp_path / "unet.pt")
    turbo(tiny.sd()).trace_unet(save_path=path)
    other = turbo(tiny.sd())
    with torch.no_grad():
        other.unet.conv_in.weight.mul_(2)
    with pytest.raises(
        TurboError, match=r"found a trace .* away from the UNet at a size and batch that were not traced"
    ):
        other.trace_unet(load_path=path)
    assert "forward" not in vars(other.unet)


def change_lora_scale(pipe):
    pipe.unet.set_adapters(["default"], weights=[0.3])


CHANGES = {
    "a LoRA": [lambda pipe: pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))],
    "its scale": [
        lambda pipe: pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)),
        change_lora_scale,
    ],
    "FreeU": [lambda pipe: pipe.enable_freeu(s1=0.6, s2=0.4, b1=1.4, b2=1.6)],
    "weights in place": [lambda pipe: pipe.unet.conv_in.weight.data.mul_(1.5)],
    "weights replaced": [lambda pipe: setattr(pipe.unet, "conv_in", tiny.unet().conv_in)],
}


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_what_changes_meanwhile_is_in_the_picture(change):
    traced, plain = turbo(tiny.sd()), tiny.sd()
    stock = tiny.picture(plain)
    traced.trace_unet()
    for step in CHANGES[change]:
        for pipe in (traced, plain):
            torch.manual_seed(2)
            step(pipe)
        wanted = tiny.picture(plain)
        assert distance(wanted, stock).psnr_db < 80
        assert distance(tiny.picture(traced), wanted).psnr_db >= 90


def test_an_argument_the_trace_has_no_input_for_runs_the_unet_itself(caplog):
    pipe = turbo(tiny.sd())
    stock = tiny.picture(pipe, cross_attention_kwargs={"scale": 0.5})
    pipe.trace_unet()
    assert torch.equal(tiny.picture(pipe, cross_attention_kwargs={"scale": 0.5}), stock)
    assert "no input for cross_attention_kwargs, the UNet runs eagerly" in caplog.text
