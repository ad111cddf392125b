"""On a GPU: switches on a tiny pipeline in any order, with calls in between, leave nothing behind."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffusers_turbo import turbo
from tests import tiny
from tests.state import differences, state_of

pytestmark = pytest.mark.gpu

SWITCHES = {
    "enable_sdpa": {"backend": "efficient"},
    "enable_naive_attention": {},
    "enable_attention_slicing": {},
    "enable_xformers_memory_efficient_attention": {},
    "enable_channels_last": {},
    "enable_half_precision": {"dtype": "float16"},
    "enable_tf32": {},
    "fuse_qkv_projections": {},
    "enable_vae_slicing": {},
    "enable_vae_tiling": {"tile_size": 32},
    "enable_sync_free_loop": {},
    "enable_model_cpu_offload": {},
    "enable_sequential_cpu_offload": {},
    "enable_group_offload": {"offload_type": "leaf_level", "use_stream": True},
    "enable_partial_offload": {"resident_bytes": 700_000},
}


@settings(max_examples=40, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(names=st.lists(st.sampled_from(sorted(SWITCHES)), min_size=1, max_size=6), call=st.booleans())
def test_random_sequences(names, call):
    pipe = turbo(tiny.sd().to("cuda"))
    stock, before = tiny.picture(pipe, steps=1), state_of(pipe)
    repeatable = torch.equal(tiny.picture(pipe, steps=1), stock)
    for name in names:
        getattr(pipe, name)(**SWITCHES[name])
        if call:
            assert torch.isfinite(tiny.picture(pipe, steps=1)).all()
    assert pipe.turbo_undo().left_alone == ()
    assert differences(before, state_of(pipe)) == []
    if repeatable:
        assert torch.equal(tiny.picture(pipe, steps=1), stock)


def test_importing_creates_no_cuda_context():
    import subprocess
    import sys

    code = "import diffusers_turbo, torch; print(torch.cuda.is_initialized())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
