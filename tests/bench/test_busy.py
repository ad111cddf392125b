"""Who decides how long a call takes: the share in which the GPU computes, and what is said where it waits."""

from __future__ import annotations

import dataclasses
import random
import statistics
from itertools import pairwise

import pytest
import torch

from diffusers_turbo.bench import session
from diffusers_turbo.bench.busy import busy_seconds, covered, kernel_spans
from diffusers_turbo.bench.results import Results, Row
from diffusers_turbo.bench.running import Contender
from diffusers_turbo.bench.tables import csv_text, markdown
from tests.bench import samples
from tests.bench.runs import SDPA, STOCK, make_job, measure


def test_what_streams_do_at_the_same_time_counts_once():
    assert covered([]) == 0
    assert covered([(3, 4), (0, 2), (1, 3), (1, 2)]) == 4
    assert covered([(0, 10), (2, 3), (12, 13)]) == 11


@pytest.mark.parametrize("steps", [1, 4, 12, 13, 50])
def test_two_short_calls_tell_of_a_long_one(steps):
    asked = []

    def call(count):
        asked.append(count)

    def spans(work, device):
        work()
        count = asked[-1]
        # a text encoder and a decode of 5 ms each, steps of 2 ms, every third of them another 6 ms
        ends = [0.0]
        for length in [5000, *(2000 + 6000 * (index % 3 == 0) for index in range(count)), 5000]:
            ends.append(ends[-1] + length)
        return [(a + 1e6, b + 1e6) for a, b in pairwise(ends)]

    whole = 10e-3 + 2e-3 * steps + 6e-3 * ((steps + 2) // 3)
    found = busy_seconds(call, steps, torch.device("cpu"), spans=spans)
    assert found == pytest.approx(whole, rel=0.08)
    assert max(asked) <= 12


def row(busy_s, seconds=(1.0, 1.1, 0.9, 1.2, 1.0, 1.3, 0.8)):
    made = samples.results().rows[0]
    return dataclasses.replace(made, seconds=list(seconds), busy_s=busy_s)


def test_the_interval_is_that_of_the_median():
    draw = random.Random(3)
    inside = 0
    for _ in range(60):
        low, high = Row(case="a", batch=1, steps=1, seconds=[draw.gauss(2, 0.1) for _ in range(15)]).median_interval_s
        inside += low <= 2 <= high
    assert 51 <= inside <= 60
    assert Row(case="a", batch=1, steps=1, seconds=[1.0]).median_interval_s is None
    low, high = row(None).median_interval_s
    assert low <= statistics.median(row(None).seconds) <= high


@pytest.mark.parametrize(("busy_s", "bound"), [(0.34, True), (0.95, False), (None, False)])
def test_a_launch_bound_row_says_so_with_its_interval(busy_s, bound):
    made = samples.results()
    made = dataclasses.replace(made, rows=[row(busy_s), *made.rows[1:]])
    line = next(line for line in markdown(made).splitlines() if line.startswith(f"| {made.rows[0].case} |"))
    low, high = made.rows[0].median_interval_s
    said = f"the CPU is the bound: GPU busy 34%, median {low:.3g}"
    assert (said in line) == bound
    assert (f"{high:.3g}" in line and "95 % bootstrap" in line) == bound
    assert ("GPU busy" in markdown(made)) == (busy_s is not None)
    assert "gpu_busy_s" in csv_text(made).splitlines()[0]
    assert Results.from_json(made.to_json()).rows[0].busy_s == busy_s


def test_rows_are_profiled_after_all_were_timed_and_a_failure_is_a_note(model, tmp_path, monkeypatch):
    seen = []

    def profile(self, row):
        seen.append((row.case, len(row.seconds)))
        if row.case == "sdpa":
            raise RuntimeError("no CUPTI")
        row.busy_s = 0.01

    monkeypatch.setattr(Contender, "profile", profile)
    monkeypatch.setattr(session, "is_cuda", lambda device: True)
    found = measure(make_job(model, STOCK, SDPA, rounds=2), tmp_path)
    assert seen == [("stock", 2), ("sdpa", 2)]
    assert [row.busy_s for row in found.rows] == [0.01, None]
    assert any("no profile of sdpa, batch 1: RuntimeError: no CUPTI" in note for note in found.notes)


@pytest.mark.gpu
def test_a_known_kernel_is_seen_for_what_it_is():
    device = torch.device("cuda")
    work = torch.randn(4096, 4096, device=device)

    def call(count):
        for _ in range(count):
            work @ work

    call(3)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call(50)
    end.record()
    end.synchronize()
    assert busy_seconds(call, 50, device) == pytest.approx(begin.elapsed_time(end) / 1e3, rel=0.1)
    assert len(kernel_spans(lambda: call(3), device)) >= 3
