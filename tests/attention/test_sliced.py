"""Sliced attention: what a plan promises, that it covers everything once, and that memory keeps to it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_turbo.attention import AttentionLayer, NaiveAttnProcessor, SlicedAttnProcessor
from diffusers_turbo.attention.sliced import Problem, Slices, bytes_per_slice, check_slice_size, cuts, slice_plan
from diffusers_turbo.bench.live_bytes import LiveBytes
from diffusers_turbo.errors import InvalidOptionError
from tests.attention.cases import MIB, layer
from tests.attention.reference import distance

PROBLEMS = st.builds(
    Problem,
    heads=st.integers(1, 24),
    n_query=st.integers(1, 20000),
    n_key=st.integers(1, 20000),
    head_dim=st.sampled_from([8, 40, 64, 160, 512]),
    itemsize=st.sampled_from([2, 4]),
    upcast_attention=st.booleans(),
    upcast_softmax=st.booleans(),
    masked=st.booleans(),
)
deterministic = settings(derandomize=True, deadline=None, max_examples=150)


@deterministic
@given(problem=PROBLEMS, heads=st.integers(1, 30), max_bytes=st.integers(1, 2**34))
def test_a_plan_keeps_to_its_bound_unless_one_row_alone_does_not(problem, heads, max_bytes):
    plan = slice_plan(problem, heads=heads, max_bytes=max_bytes)
    assert 1 <= plan.heads <= min(heads, problem.heads)
    assert 1 <= plan.rows <= problem.n_query
    assert plan.rows == problem.n_query or plan.heads == 1
    assert bytes_per_slice(problem, plan.heads, plan.rows) <= max_bytes or plan == Slices(1, 1)


@deterministic
@given(problem=PROBLEMS, max_bytes=st.integers(1, 2**34))
def test_no_larger_slice_would_keep_to_the_bound(problem, max_bytes):
    plan = slice_plan(problem, heads=problem.heads, max_bytes=max_bytes)
    if plan.rows < problem.n_query:
        assert bytes_per_slice(problem, 1, plan.rows + 1) > max_bytes
    elif plan.heads < problem.heads:
        assert bytes_per_slice(problem, plan.heads + 1, problem.n_query) > max_bytes


@deterministic
@given(total=st.integers(1, 500), step=st.integers(1, 600))
def test_cuts_cover_everything_exactly_once(total, step):
    covered = [index for cut in cuts(total, step) for index in range(total)[cut]]
    assert covered == list(range(total))
    assert max(cut.stop - cut.start for cut in cuts(total, step)) <= step


@pytest.mark.parametrize(
    ("slice_size", "heads"), [("auto", 4), ("max", 1), (3, 3), (8, 8), (None, 8)], ids=["auto", "max", "3", "8", "None"]
)
def test_slice_sizes(slice_size, heads, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "diffusers_turbo.attention.sliced.slice_plan",
        lambda problem, **limits: seen.append(limits) or slice_plan(problem, **limits),
    )
    SlicedAttnProcessor(slice_size, max_bytes=2**30)(layer(heads=8, dim_head=4), torch.randn(1, 5, 32))
    assert seen == [{"heads": heads, "max_bytes": 2**30}]


@pytest.mark.parametrize("slice_size", [0, -1, "most", 1.5, True], ids=str)
def test_an_impossible_slice_size_is_refused(slice_size):
    with pytest.raises(InvalidOptionError, match=r"found slice_size=.*; needed: 'auto', 'max', None or a number"):
        SlicedAttnProcessor(slice_size)


@pytest.mark.parametrize("max_bytes", [0, -5, 1.5], ids=str)
def test_an_impossible_bound_is_refused(max_bytes):
    with pytest.raises(InvalidOptionError, match=r"found max_bytes=.*; needed: None or a number of bytes from 1 up"):
        SlicedAttnProcessor(max_bytes=max_bytes)


def test_more_heads_than_the_layer_has_are_refused():
    with pytest.raises(InvalidOptionError, match=r"found slice_size=5; needed: at most 4, the layer's heads"):
        SlicedAttnProcessor(5)(layer(heads=4), torch.randn(1, 5, 32))
    layers = [
        AttentionLayer(heads=heads, head_dim=8, dtype=torch.float32, device=torch.device("cpu")) for heads in (8, 4)
    ]
    check_slice_size(4, layers)
    check_slice_size("auto", [])
    with pytest.raises(InvalidOptionError, match=r"found slice_size=5; needed: at most 4, the layer's heads"):
        check_slice_size(5, layers)


def peak_beyond_output(attn, processor, query, key, value, mask) -> int:
    with torch.no_grad(), LiveBytes() as memory:
        processor.attend(attn, query, key, value, mask)
    return memory.peak - query.nbytes


CASES = {
    "plain": {},
    "upcast_attention": {"upcast_attention": True},
    "upcast_softmax": {"upcast_softmax": True},
    "upcast_both": {"upcast_attention": True, "upcast_softmax": True},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("max_kib", [16, 60, 250])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_live_tensors_keep_to_the_bound_and_use_it(options, dtype, max_kib, masked):
    attn = layer(dtype, **options)
    query, key, value = (torch.randn(2, n, 4, 8, dtype=dtype).transpose(1, 2) for n in (60, 300, 300))
    mask = torch.zeros(2, 4, 60, 300, dtype=dtype) if masked else None
    processor = SlicedAttnProcessor(None, max_bytes=max_kib * 1024)
    peak = peak_beyond_output(attn, processor, query, key, value, mask)
    assert peak <= max_kib * 1024
    # A bound that is kept by wasting half of it would be no plan.
    assert peak > max_kib * 1024 / 2
    wanted = NaiveAttnProcessor().attend(attn, query, key, value, mask)
    assert distance(processor.attend(attn, query, key, value, mask), wanted) < 0.01


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [4096, 16384])
@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("max_mib", [16, 64, 256])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_measured_peak_on_a_gpu(tokens, options, max_mib, masked):
    attn = layer(torch.float16, "cuda", **options)
    query, key, value = (
        torch.randn(2, tokens, 8, 40, device="cuda", dtype=torch.float16).transpose(1, 2) for _ in range(3)
    )
    mask = torch.zeros(2, 1, 1, tokens, device="cuda", dtype=torch.float16) if masked else None
    processor = SlicedAttnProcessor(None, max_bytes=max_mib * MIB)
    with torch.no_grad():
        processor.attend(attn, query[:1, :, :64], key[:1], value[:1], None)  # cuBLAS takes its workspace once
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        output = processor.attend(attn, query, key, value, mask)
        torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before - output.untyped_storage().nbytes()
    # The allocator may hand out up to 1 MiB more than asked for each of the few tensors of a slice.
    assert peak <= max_mib * MIB + 4 * MIB
    print(f"tokens {tokens}, {options}, bound {max_mib} MiB, measured {peak / MIB:.1f} MiB")
