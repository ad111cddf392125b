"""What the host did while the GPU waited: times and places add up, and the main thread is seen where it is."""

from __future__ import annotations

import math
import sys
import threading
import time
from contextlib import contextmanager

import pytest
import torch

from diffusers_turbo.bench import waits
from diffusers_turbo.bench.trace import trace_waits
from diffusers_turbo.bench.waits import Sample, Watched, describe_waits, sampled, watch
from tests.bench.test_trace import make  # noqa: F401

PIPELINE = ("Pipeline.__call__", "/site/diffusers/pipelines/sd/pipeline_sd.py", 7)
BENCH = ("measure", "/bench.py", 1)


def stack(*inner, line=7):
    return (BENCH, (*PIPELINE[:2], line), *((name, f"/site/turbo/{name}.py", 1) for name in inner))


def test_each_wait_is_laid_to_where_the_host_was():
    samples = [
        Sample(100, stack("encode"), outside=1),  # in the wait before the first kernel
        Sample(200, stack("encode", "tokenize"), outside=1),
        Sample(300, stack("loop", line=9), outside=1),  # the GPU works
        Sample(460, stack("loop", line=9), outside=1),  # 60 us of a wait
        Sample(500, stack("decode", line=9), outside=1),
    ]
    found = Watched(0, 500, samples, spans=[(200, 400), (150, 260), (460, 490)])
    assert list(found.waits()) == [(0, 150), (400, 460)]  # the last 10 us are no wait
    head, *lines = describe_waits(found).splitlines()
    assert head == (
        "a call of 0.5 ms; the GPU had nothing to do for 0.2 of them, 2 times; for 0.1 ms before its first kernel"
    )
    by_line, by_function = "\n".join(lines).strip().split("\n\n")
    rows = [[line.split("  ")[-1] for line in part.splitlines()[1:]] for part in (by_line, by_function)]
    times = [[float(line.split()[0]) for line in part.splitlines()[1:]] for part in (by_line, by_function)]
    assert rows[0] == ["Pipeline.__call__:7 (sd/pipeline_sd.py)", "Pipeline.__call__:9 (sd/pipeline_sd.py)"]
    assert times[0] == [0.15, 0.06]
    # what is outside of the call is left out, and a function has what it called
    assert dict(zip(rows[1], times[1], strict=True)) == {
        "Pipeline.__call__ (sd/pipeline_sd.py)": 0.21,
        "encode (turbo/encode.py)": 0.15,
        "tokenize (turbo/tokenize.py)": 0.05,
        "loop (turbo/loop.py)": 0.06,
    }


def test_a_gpu_that_never_waits():
    assert "the GPU had nothing to do for 0.0 of them, 0 times" in describe_waits(Watched(0, 100, [], [(5, 95)]))


def test_the_main_thread_is_seen_where_it_is_and_nothing_is_left_behind():
    samples, interval = [], sys.getswitchinterval()

    def rest():
        time.sleep(0.05)

    with sampled(samples):
        rest()
    assert sys.getswitchinterval() == interval
    assert threading.active_count() == len(threading.enumerate())
    inside = [sample for sample in samples if sample.stack[-1][0].endswith("rest")]
    assert inside
    # the first frame that is not outside is the one that entered
    assert {sample.stack[sample.outside - 1][0] for sample in inside} == {
        "test_the_main_thread_is_seen_where_it_is_and_nothing_is_left_behind"
    }


def test_a_call_without_kernels_is_one_wait():
    found = watch(lambda: time.sleep(0.1), torch.device("cpu"))
    assert list(found.waits()) == [(found.begin, found.end)]
    assert found.begin <= found.samples[0].at < found.samples[-1].at <= found.end


def test_samples_before_and_after_the_call_are_left_out(monkeypatch):
    @contextmanager
    def too_long(samples):
        samples.append(Sample(0.0, (), 0))
        yield
        samples.append(Sample(math.inf, (), 0))

    monkeypatch.setattr(waits, "sampled", too_long)
    assert watch(lambda: None, torch.device("cpu")).samples == []


def test_the_waits_of_a_contender_are_written(make, tmp_path):  # noqa: F811
    path = trace_waits(make(steps=4), tmp_path)
    assert path == tmp_path / "stock-waits.txt"
    text = path.read_text(encoding="utf-8")
    assert text.startswith("stock, 4 steps: a call of ")
    assert "UNet2DConditionModel.forward" in text


@pytest.mark.gpu
def test_kernels_and_samples_have_one_clock():
    device = torch.device("cuda")
    work = torch.randn(4096, 4096, device=device)

    def call():
        time.sleep(0.05)
        for _ in range(20):
            work @ work
        torch.cuda.synchronize()
        time.sleep(0.05)

    call()
    found = watch(call, device)
    first, last = min(begin for begin, _ in found.spans), max(end for _, end in found.spans)
    assert found.begin + 49e3 < first < last < found.end - 49e3
    assert "test_kernels_and_samples_have_one_clock.<locals>.call" in describe_waits(found)
