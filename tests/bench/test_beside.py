"""Published numbers beside what was measured, in the units that were published."""

from __future__ import annotations

from typing import Any

import pytest

from diffusers_turbo.bench.beside import published_lines
from diffusers_turbo.bench.results import Results, Row
from diffusers_turbo.bench.suites import Published, Section, read_suite
from tests.bench import samples
from tests.bench.samples import GIB

LINK, OTHER = "https://example.org/first", "https://example.org/second"


def published(case: str, batch: int = 1, **numbers: Any) -> Published:
    return Published(**{"case": case, "batch": batch, "device": "T4", "source": LINK, **numbers})


def section(*items: Published, **changes: Any) -> Section:
    given = {"name": "s", "title": "S", "arch": "sd15", "height": 512, "width": 512, "steps": 50, "prompt": "a cat"}
    return Section(**{**given, "cases": samples.CASES, "baseline": "stock", "published": items, **changes})


def table(lines: list[str]) -> list[dict[str, str]]:
    assert lines[0] == ""
    heading, ruler, *rows = (line for line in lines if line.startswith("|"))
    names = [name.strip() for name in heading.strip("|").split("|")]
    assert ruler.count("|") == heading.count("|")
    return [dict(zip(names, map(str.strip, row.strip("|").split("|")), strict=True)) for row in rows]


def test_seconds_beside_seconds():
    """Here the stock call takes 2.0 s and the sdpa-flash one 1.6 s."""
    lines = published_lines(
        section(published("stock", seconds=10.0), published("sdpa-flash", seconds=5.0)), samples.results()
    )
    assert table(lines) == [
        {
            "case": "stock",
            "batch": "1",
            "here": "2.00 s",
            "gain here": "+0 %",
            "published on": "T4",
            "published": "10.0 s",
            "gain there": "+0 %",
        },
        {
            "case": "sdpa-flash",
            "batch": "1",
            "here": "1.60 s",
            "gain here": "+25 %",
            "published on": "T4",
            "published": "5.00 s",
            "gain there": "+100 %",
        },
    ]
    assert lines[-1] == LINK


def test_iterations_and_peaks_in_their_own_units():
    items = (
        published("stock", iterations_per_s=20.0),
        published("sdpa-flash", iterations_per_s=30.0),
        published("fp16", peak_bytes=3 * GIB, note="less than"),
    )
    stock, flash, fp16 = table(published_lines(section(*items), samples.results()))
    # 50 steps in 2.0 and 1.6 seconds
    assert (stock["here"], flash["here"], flash["published"], flash["gain there"]) == (
        "25.0 it/s",
        "31.2 it/s",
        "30.0 it/s",
        "+50 %",
    )
    assert (fp16["here"], fp16["published"], fp16["gain there"]) == ("3.00 GiB", "3.00 GiB, less than", "-")
    assert fp16["gain here"] == "+150 %"


def test_batches_and_devices_are_not_mixed():
    items = (
        published("stock", seconds=10.0),
        published("stock", 4, seconds=40.0),
        published("sdpa-flash", 4, seconds=32.0),
        published("stock", 4, seconds=8.0, device="A100"),
        published("sdpa-flash", 4, seconds=4.0, device="A100", source=OTHER),
        published("fp16", 4, seconds=4.0, device="V100"),
    )
    lines = published_lines(section(*items), samples.results())
    found = {(row["case"], row["batch"], row["published on"]): row for row in table(lines)}
    assert len(found) == 6
    assert found["sdpa-flash", "4", "T4"]["gain there"] == "+25 %"
    assert found["sdpa-flash", "4", "A100"]["gain there"] == "+100 %"
    assert found["sdpa-flash", "4", "A100"]["here"] == "6.40 s"
    assert found["fp16", "4", "V100"]["gain there"] == "-"
    assert lines[-2:] == [LINK, OTHER]


def test_both_gains_are_relative_to_the_results_baseline():
    items = (published("stock", seconds=10.0), published("sdpa-flash", seconds=5.0))
    results = samples.results()
    results.baseline = "sdpa-flash"
    stock, _ = table(published_lines(section(*items), results))
    assert (stock["gain here"], stock["gain there"]) == ("-20 %", "-50 %")


def test_rows_without_a_result_say_what_became_of_them():
    cases = ("naive", "xformers", "late")
    items = [published(case, batch, seconds=1.0) for case in cases for batch in (1, 4)]
    found = {(row["case"], row["batch"]): row for row in table(published_lines(section(*items), samples.results()))}
    assert found["naive", "4"]["here"] == "out of memory"
    assert found["xformers", "1"]["here"] == "unsupported"
    assert found["xformers", "4"]["here"] == "failed"
    assert found["late", "4"]["here"] == "not run"
    assert found["late", "1"]["here"] == "1.90 s"
    assert {found["naive", "4"][name] for name in ("gain here", "gain there")} == {"-"}


def test_a_peak_that_was_not_measured():
    row = Row(case="stock", batch=1, steps=50, status="ok", seconds=[1.0])
    results = Results(job=samples.job(), rows=[row], started="now")
    (found,) = table(published_lines(section(published("stock", peak_bytes=GIB)), results))
    assert (found["here"], found["published"]) == ("-", "1.00 GiB")


def test_nothing_published_of_these_rows_is_no_table():
    assert published_lines(section(), samples.results()) == []
    assert published_lines(section(published("compiled", seconds=1.0)), samples.results()) == []
    assert published_lines(section(published("stock", 2, seconds=1.0)), samples.results()) == []


def test_a_note_on_the_protocol_and_bars_in_names():
    lines = published_lines(
        section(published("stock", seconds=1.0, device="A | B"), note="Read so."), samples.results()
    )
    assert r"| A \| B |" in lines[3]
    assert lines[-3:] == ["", "Read so.", LINK]


@pytest.mark.parametrize("name", ["photoroom", "pytorch-blog", "diffusers-docs", "peers"])
def test_every_published_row_of_the_suites_appears(name):
    for part in read_suite(name).sections:
        job = samples.job(cases=part.cases, batches=part.batches)
        rows = [
            Row(case=case.name, batch=batch, steps=part.steps, status="ok", seconds=[1.0], peak_allocated_bytes=GIB)
            for case in part.cases
            for batch in part.batches
        ]
        results = Results(job=job, rows=rows, baseline=part.baseline, started="now")
        lines = published_lines(part, results)
        assert len(table(lines) if lines else []) == len(part.published)
        assert {item.source for item in part.published} <= set(lines)
