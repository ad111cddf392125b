"""What an error about memory suggests: the smallest change that the estimate says would fit."""

from __future__ import annotations

import pytest

from diffusers_turbo.planning.options import VAESlicing
from diffusers_turbo.planning.shrinking import suggest
from diffusers_turbo.planning.units import GIB
from tests.planning.architectures import facts_of


@pytest.mark.parametrize(
    ("stage", "request_", "text"),
    [
        ("denoise", {"batch_size": 8}, "make 7 at a time: its denoise stage is estimated at"),
        ("denoise", {"batch_size": 8, "usable_bytes": 3 * GIB}, "make 2 at a time"),
        ("decode", {"batch_size": 4}, "make 3 at a time: its decode stage"),
        ("decode", {"batch_size": 4, "options": [VAESlicing()]}, "enable_memory_fallback(allow_tiling=True), which is"),
        ("decode", {}, "enable_memory_fallback(allow_tiling=True), which is lossy: its decode stage is estimated at"),
        ("decode", {"tiling": True}, "make one of 768x768 at a time"),
        ("denoise", {"usable_bytes": 2 * GIB}, "make one of 512x512 at a time"),
        ("encode", {}, "use a larger card or half precision"),
    ],
)
def test_the_smallest_change_that_fits(stage, request_, text):
    arguments = {"height": 1024, "width": 1024, "batch_size": 1} | request_
    assert suggest(facts_of("sd15"), stage, **arguments).startswith(text)
