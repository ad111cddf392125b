"""A float32 copy of the VAE: the bits of diffusers' casts without the casts, and nothing left outside of calls."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch

from diffusers_turbo import turbo
from diffusers_turbo.bench.tasks import for_task, task_inputs
from diffusers_turbo.errors import NotSupportedError
from diffusers_turbo.graphs.capture import CAPTURES
from tests import tiny
from tests.graphs.fake import FakeCapture
from tests.state import differences, state_of


def half(task: str = "txt2img") -> Any:
    return for_task(tiny.sdxl().to(torch.float16), task)


def twins(task: str = "txt2img") -> tuple[Any, Any]:
    """A stock pipeline in float16, and its equal with a copy of the VAE."""
    kept = turbo(half(task))
    kept.enable_vae_upcast_copy()
    return half(task), kept


def addresses(pipe: Any) -> list[tuple[int, torch.dtype]]:
    return [(weight.data_ptr(), weight.dtype) for weight in pipe.vae.parameters()]


def casts(pipe: Any) -> int:
    """How often a single weight was cast, as the report says."""
    return int(re.search(r"; (\d+) casts of one weight", str(pipe.turbo_report()))[1])


class Decodes:
    """Notes where the decoder's weights lie when it runs."""

    def __init__(self, pipe: Any) -> None:
        self.seen: list[list[tuple[int, torch.dtype]]] = []
        self.handle = pipe.vae.decoder.register_forward_pre_hook(lambda *_: self.seen.append(addresses(pipe)))


def test_the_same_bits_at_the_same_addresses():
    stock, kept = twins()
    before = addresses(kept)
    decodes = Decodes(kept)
    for seed in range(3):
        assert torch.equal(tiny.picture(kept, seed=seed), tiny.picture(stock, seed=seed))
        assert addresses(kept) == before
    assert decodes.seen[0] == decodes.seen[1] == decodes.seen[2]
    assert {dtype for _, dtype in decodes.seen[0]} == {torch.float32}
    assert casts(kept) == len(addresses(kept))


@pytest.mark.parametrize("task", ["img2img", "inpaint"])
def test_pipelines_that_encode_too(task):
    stock, kept = twins(task)
    inputs = {"prompt": "red cat", "num_inference_steps": 2, "output_type": "pt", **task_inputs(task, 64, 64, 1)}
    for seed in range(2):
        pictures = [pipe(**inputs, generator=torch.Generator().manual_seed(seed)).images for pipe in (stock, kept)]
        assert torch.equal(*pictures)
    assert casts(kept) == len(addresses(kept))


def halved(pipe: Any) -> None:
    with torch.no_grad():
        for weight in pipe.vae.decoder.conv_out.parameters():
            weight.mul_(0.5)


def exchanged(pipe: Any) -> None:
    weight = pipe.vae.decoder.conv_out.weight
    weight.data = weight.data * 0.5


@pytest.mark.parametrize(("change", "changed"), [(halved, 2), (exchanged, 1)])
def test_changed_weights_are_copied_anew(change, changed):
    stock, kept = twins()
    first = tiny.picture(kept)
    for pipe in (stock, kept):
        change(pipe)
    assert torch.equal(tiny.picture(kept), tiny.picture(stock))
    assert not torch.equal(tiny.picture(kept), first)
    assert casts(kept) == len(addresses(kept)) + changed


def test_a_graph_of_the_decoder_lives_on(monkeypatch):
    monkeypatch.setitem(CAPTURES, "cpu", FakeCapture)
    for keep, captured in ((True, 1), (False, 2)):
        stock, pipe = half(), turbo(half())
        if keep:
            pipe.enable_vae_upcast_copy()
        pipe.enable_cuda_graphs()
        for seed in range(5):
            assert torch.equal(tiny.picture(pipe, seed=seed), tiny.picture(stock, seed=seed))
        decoder = pipe.vae.decoder._compiled_call_impl
        assert (decoder.captured == 1) == keep, (decoder.captured, captured)


def test_undo_and_copies():
    pipe = turbo(half())
    stock, before = tiny.picture(pipe), state_of(pipe)
    pipe.enable_vae_upcast_copy()
    tiny.picture(pipe)
    copied = copy.deepcopy(pipe)
    assert torch.equal(tiny.picture(copied), stock)
    assert pipe.turbo_undo().left_alone == ()
    assert differences(before, state_of(pipe)) == []
    assert torch.equal(tiny.picture(pipe), stock)
    assert torch.equal(tiny.picture(copied), stock)


def test_an_error_in_the_decoder_leaves_the_weights_in_half():
    _, kept = twins()
    before = addresses(kept)
    handle = kept.vae.decoder.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tiny.picture(kept)
    handle.remove()
    assert addresses(kept) == before
    assert "to" not in vars(kept.vae)


def test_other_casts_are_the_hosts():
    stock, kept = twins()
    for pipe in (stock, kept):
        pipe.vae.register_forward_pre_hook(lambda *_: None)
        pipe.to(torch.bfloat16)
    assert torch.equal(tiny.picture(kept), tiny.picture(stock))
    for pipe in (stock, kept):
        pipe.to(torch.float32)
    assert torch.equal(tiny.picture(kept), tiny.picture(stock))


@pytest.mark.parametrize("make", [tiny.sd, tiny.sdxl, lambda: tiny.sd().to(torch.float16)])
def test_refused_where_nothing_is_cast(make):
    with pytest.raises(
        NotSupportedError, match=r"enable_vae_upcast_copy\(\): found a .* whose VAE \(float.*is not cast"
    ):
        turbo(make()).enable_vae_upcast_copy()


def test_refused_under_offload():
    pipe = turbo(half())
    pipe.enable_model_cpu_offload(device="cpu")
    with pytest.raises(NotSupportedError, match="offload hooks on the VAE"):
        pipe.enable_vae_upcast_copy()
