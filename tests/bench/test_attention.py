"""One attention call: every backend that runs here, exact peaks, reasons of those that do not, turns."""

from __future__ import annotations

import gc
import statistics

import pytest
import torch

from diffusers_turbo.attention import NaiveAttnProcessor
from diffusers_turbo.bench import attention
from diffusers_turbo.bench.attention import BACKENDS, HEAD_DIM, HEADS, Point, measure_attention
from diffusers_turbo.bench.live_bytes import LiveBytes
from diffusers_turbo.errors import InvalidOptionError

TOKENS = (64, 128, 256)
ON_CPU = ("naive", "sliced", "sdpa math", "sdpa auto", "sdpa flash")


@pytest.fixture(scope="module")
def points() -> list[Point]:
    """Every backend on the CPU."""
    return list(measure_attention("cpu", "float32", tokens=TOKENS, batch=2, rounds=3))


def peaks(points: list[Point], backend: str) -> list[int]:
    return [point.peak_bytes for point in points if point.backend == backend]


def test_a_point_for_each_backend_and_number_of_tokens_in_order(points):
    assert [(point.tokens, point.backend) for point in points] == [(n, name) for n in TOKENS for name in BACKENDS]
    for point in points:
        if point.backend in ON_CPU:
            assert len(point.samples) == 3
            assert min(point.samples) > 0
            assert point.microseconds == statistics.median(point.samples)
            assert point.reason is None
        else:
            assert (point.microseconds, point.peak_bytes, point.samples) == (None, None, ())
            assert "runs on cuda, the layer is on cpu" in point.reason
    assert points[0].as_dict()["tokens"] == 64


def test_naive_attention_holds_two_matrices_of_n_squared(points):
    assert peaks(points, "naive") == [2 * (2 * HEADS) * n * n * 4 for n in TOKENS]


def test_flash_attention_grows_with_n_only(points):
    small, middle, large = peaks(points, "sdpa flash")
    assert (middle, large) == (2 * small, 4 * small)
    output = 2 * HEADS * TOKENS[0] * HEAD_DIM * 4
    assert output <= small < 1.1 * output


def test_slices_need_less_than_the_whole_matrix_and_more_than_flash(points):
    for naive, sliced, flash in zip(*(peaks(points, name) for name in ("naive", "sliced", "sdpa flash")), strict=True):
        assert flash < sliced < naive


def test_half_the_bytes_in_half_precision_and_twice_for_two_pictures():
    (naive,) = measure_attention("cpu", "bfloat16", tokens=[64], batch=4, rounds=1, backends=["naive"])
    assert naive.peak_bytes == 2 * (4 * HEADS) * 64 * 64 * 2


def test_backends_take_turns(monkeypatch):
    order = []

    class Named(NaiveAttnProcessor):
        def __init__(self, name: str) -> None:
            self.name = name

        def attend(self, attn, query, key, value, mask):
            assert (attn.heads, attn.scale) == (HEADS, HEAD_DIM**-0.5)
            assert query.shape == (1, HEADS, 16, HEAD_DIM)
            assert not torch.is_grad_enabled()
            order.append(self.name)
            return query

    for name in ("naive", "sliced"):
        monkeypatch.setitem(BACKENDS, name, lambda name=name: Named(name))
    monkeypatch.setattr(attention, "_SAMPLE_S", 0)  # one call a sample
    found = measure_attention("cpu", "float32", tokens=[16], batch=1, rounds=3, backends=["sliced", "naive"])
    assert [point.backend for point in found] == ["sliced", "naive"]
    # memory and two samples to find the number of calls, each alone; then by turns
    assert order == ["sliced"] * 3 + ["naive"] * 3 + ["sliced", "naive"] * 3


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError("64.00 GiB\nmore"), "OutOfMemoryError: 64.00 GiB more"),
        (RuntimeError("no kernel"), "RuntimeError: no kernel"),
    ],
)
def test_a_backend_that_breaks_is_a_reason_and_the_others_go_on(monkeypatch, error, reason):
    class Broken(NaiveAttnProcessor):
        def attend(self, *args):
            raise error

    monkeypatch.setitem(BACKENDS, "sliced", Broken)
    sliced, naive = measure_attention("cpu", "float32", tokens=[16], rounds=1, backends=["sliced", "naive"])
    assert (sliced.microseconds, sliced.reason) == (None, reason)
    assert naive.microseconds > 0


def test_an_unknown_backend_is_refused_before_anything_runs():
    with pytest.raises(InvalidOptionError, match="no backend 'sdpa flsh' \\(did you mean .*sdpa flash.*some of naive"):
        measure_attention("cpu", "float32", tokens=[16], backends=["naive", "sdpa flsh"])


def test_live_bytes_counts_storages_once_and_until_they_go():
    with LiveBytes() as memory:
        whole = torch.zeros(256)  # 1024 bytes
        view = whole.view(16, 16)
        view.add_(1)
        assert (memory.live, memory.peak) == (1024, 1024)
        other = view + 1
        assert (memory.live, memory.peak) == (2048, 2048)
        del whole
        gc.collect()
        assert memory.live == 2048  # the view holds it
        del view, other
        gc.collect()
        assert (memory.live, memory.peak) == (0, 2048)
    torch.zeros(4096)
    assert memory.peak == 2048
