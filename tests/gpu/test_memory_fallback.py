"""Memory that really runs out: a cap on the allocator, a full-size network, the picture all the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from diffusers_turbo import turbo
from diffusers_turbo.errors import OutOfMemoryError
from diffusers_turbo.parity import distance
from tests import full_size, tiny

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]


@contextmanager
def at_most(extra_bytes: int) -> Iterator[None]:
    """Let this process hold so much more than it holds now."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + extra_bytes) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("extra_mib", [1200, 600, 300])
def test_a_full_size_pipeline_steps_down_and_remembers(extra_mib):
    pipe = turbo(full_size.build("sd15"))
    stock = tiny.picture(pipe, steps=2, batch=2)
    pipe.enable_memory_fallback()
    with at_most(extra_mib * 2**20):
        ours = tiny.picture(pipe, steps=2, batch=2)
        taken = str(pipe.turbo_report()).count("out of memory in ")
        again = tiny.picture(pipe, steps=2, batch=2)
    assert distance(ours, stock).psnr_db >= 40
    assert distance(again, stock).psnr_db >= 40
    assert pipe.turbo_report().exact
    if extra_mib == 300:
        assert taken > 0, "the cap was not felt"
    pipe.turbo_undo()
    assert pipe.unet.conv_in.weight.device.type == "cuda"
    assert distance(tiny.picture(pipe, steps=2, batch=2), stock).psnr_db >= 60


def test_when_nothing_fits_one_error_and_the_memory_comes_back():
    pipe = turbo(full_size.build("sd15"))
    stock = tiny.picture(pipe, steps=1)
    held = torch.cuda.memory_allocated()
    pipe.enable_memory_fallback()
    with at_most(8 * 2**20), pytest.raises(OutOfMemoryError, match="What to do: "):
        tiny.picture(pipe, steps=1, batch=8, height=2048, width=2048)
    pipe.turbo_undo()
    assert torch.cuda.memory_allocated() <= held + 64 * 2**20
    assert distance(tiny.picture(pipe, steps=1), stock).psnr_db >= 60
