from __future__ import annotations

import dataclasses
import json
import math
import re
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_turbo.bench.cases import Case, Switch
from diffusers_turbo.bench.results import FORMAT_VERSION, Job, Results, Row, Status
from diffusers_turbo.bench.strict_json import dumps, loads
from diffusers_turbo.errors import InvalidOptionError
from tests.bench import samples


def refuse_literal(literal: str):
    raise AssertionError(f"{literal} is no strict JSON")


def test_results_come_back_equal_with_their_cases_and_infinite_decibels(tmp_path):
    made = samples.results()
    made.save(tmp_path / "new" / "results.json")
    read = Results.load(tmp_path / "new" / "results.json")
    assert read == made
    assert read.row("stock", 1).distance["ours"]["psnr_db"] == math.inf
    assert read.row("naive", 4).status is Status.OUT_OF_MEMORY
    assert isinstance(read.job.cases[1].switches[0], Switch)


def test_the_file_is_strict_json():
    data = json.loads(samples.results().to_json(), parse_constant=refuse_literal)
    assert data["format_version"] == FORMAT_VERSION
    assert data["rows"][0]["distance"]["ours"]["psnr_db"] == {"$float": "inf"}


def test_nan_survives_and_what_json_does_not_know_becomes_text():
    class Half:
        def __str__(self):
            return "torch.float16"

    read = loads(dumps({"nan": math.nan, "low": -math.inf, "dtype": Half(), 4: (1, 2)}))
    assert math.isnan(read.pop("nan"))
    assert read == {"low": -math.inf, "dtype": "torch.float16", "4": [1, 2]}
    with pytest.raises(ValueError, match="Infinity is no JSON number"):
        loads('{"a": Infinity}')


TEXTS = st.text(max_size=8)
FLOATS = st.floats(allow_nan=False)
SECONDS = st.lists(st.floats(min_value=1e-6, max_value=1e6), max_size=5)
BYTES = st.none() | st.integers(0, 2**45)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | FLOATS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
DATA = st.none() | st.dictionaries(TEXTS, PLAIN, max_size=3)
ROWS = st.builds(
    Row,
    case=st.sampled_from(["stock", "sdpa"]),
    batch=st.integers(1, 64),
    steps=st.integers(1, 100),
    status=st.sampled_from(Status),
    reason=st.none() | TEXTS,
    load_s=st.none() | FLOATS,
    seconds=SECONDS,
    warmup_s=SECONDS,
    peak_allocated_bytes=BYTES,
    report=DATA,
    distance=DATA,
    verdict=st.sampled_from([None, "exact", "close", "different"]),
    verdict_reasons=st.lists(TEXTS, max_size=2),
)
JOBS = st.builds(
    Job,
    model=TEXTS,
    task=st.sampled_from(["txt2img", "img2img", "inpaint"]),
    cases=st.just((Case(name="stock"), Case(name="sdpa", switches=(Switch(action="enable_sdpa"),)))),
    batches=st.lists(st.integers(1, 99), min_size=1, max_size=3, unique=True).map(tuple),
    guidance_scale=st.none() | FLOATS,
    prompt=TEXTS,
    isolate=st.booleans(),
)


@settings(derandomize=True, max_examples=40, deadline=None)
@given(JOBS, st.lists(ROWS, max_size=4), DATA, st.sampled_from(["", "stock", "sdpa"]))
def test_any_results_come_back_equal(job, rows, environment, baseline):
    made = Results(job=job, rows=rows, environment=environment or {}, baseline=baseline, started="now")
    text = made.to_json()
    json.loads(text, parse_constant=refuse_literal)
    assert Results.from_json(text) == made


@settings(derandomize=True, max_examples=60, deadline=None)
@given(st.data())
def test_no_prefix_of_a_file_is_taken_for_results(data):
    text = samples.results().to_json()
    length = data.draw(st.integers(0, len(text) - 1))
    with pytest.raises(InvalidOptionError, match="needed: a whole file of results"):
        Results.from_json(text[:length])


def whole() -> dict:
    return json.loads(samples.results().to_json())


def without(data: dict, *path: str | int) -> dict:
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return data


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "an empty file"),
        (b'{"format_version": 1, "job": {"mod', "JSONDecodeError"),
        (b"[1, 2]", "TypeError"),
        (b"\xff\xfe\x00", "bytes that are not UTF-8"),
        (b"{}", "KeyError: 'format_version'"),
        (json.dumps(whole() | {"format_version": 9}).encode(), "format_version 9"),
        (json.dumps(whole() | {"surprise": 1}).encode(), "surprise"),
        (json.dumps(without(whole(), "started")).encode(), "started"),
        (json.dumps(without(whole(), "rows", 0, "seconds")).encode(), "seconds"),
        (json.dumps(without(whole(), "job", "cases")).encode(), "cases"),
        (json.dumps(whole()).replace('"enable_sdpa', '"enable_magic').encode(), "enable_magic"),
        (json.dumps(whole()).replace('"out of memory"', '"tired"').encode(), "tired"),
    ],
)
def test_what_is_not_a_whole_file_of_results_is_named_and_never_overwritten(tmp_path, content, found):
    path = tmp_path / "results.json"
    path.write_bytes(content)
    for attempt in (lambda: Results.load(path), lambda: samples.results().save(path)):
        with pytest.raises(InvalidOptionError, match="move it away or choose another --out") as caught:
            attempt()
        assert str(path) in str(caught.value)
        assert found in str(caught.value)
        assert "\n" not in str(caught.value)
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_saving_replaces_earlier_results_and_leaves_nothing_beside_them(tmp_path):
    path = tmp_path / "results.json"
    made = samples.results()
    made.save(path)
    made.rows.pop()
    made.save(path)
    assert Results.load(path) == made
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_save_leaves_the_earlier_results(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    samples.results().save(path)
    before = path.read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(InvalidOptionError, match="OSError: No space left on device.*choose another place with --out"):
        samples.results().save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        InvalidOptionError, match="writing the results to .*needed: a folder that can be made"
    ) as caught:
        samples.results().save(tmp_path / "file" / "results.json")
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(InvalidOptionError, match="none.json: found FileNotFoundError.*correct the path"):
        Results.load(tmp_path / "none.json")


def test_medians_quartiles_and_rates():
    row = Row(case="a", batch=4, steps=50, seconds=[4.0, 1.0, 2.0, 3.0, 10.0])
    assert (row.low_s, row.median_s, row.high_s) == (2.0, 3.0, 4.0)
    assert row.iterations_per_s == pytest.approx(50 / 3)
    assert row.images_per_s == pytest.approx(4 / 3)


def test_one_round_is_its_own_quartiles_and_none_gives_nothing():
    row = Row(case="a", batch=1, steps=5)
    names = ("median_s", "low_s", "high_s", "iterations_per_s", "images_per_s")
    assert [getattr(row, name) for name in names] == [None] * 5
    row.seconds.append(2.0)
    assert [getattr(row, name) for name in names] == [2.0, 2.0, 2.0, 2.5, 0.5]


@settings(derandomize=True, deadline=None)
@given(st.lists(st.integers(1, 1000).map(float), min_size=1, max_size=9))
def test_quartiles_enclose_the_median(seconds):
    row = Row(case="a", batch=1, steps=1, seconds=seconds)
    assert min(seconds) <= row.low_s <= row.median_s <= row.high_s <= max(seconds)
    assert row.median_s == statistics.median(seconds)


def test_percent_is_how_much_faster_at_the_same_batch_size():
    made = samples.results()
    assert made.baseline == "stock"
    assert made.percent(made.row("stock", 4)) == 0
    assert made.percent(made.row("sdpa-flash", 1)) == pytest.approx(25.0)
    assert made.percent(made.row("fp16", 4)) == pytest.approx(150.0)  # 8.0 s against 3.2 s, not against 2.0 s
    assert made.percent(made.row("naive", 1)) == pytest.approx(100 * (2.0 / 3.1 - 1))


def test_percent_takes_another_baseline_by_name():
    made = dataclasses.replace(samples.results(), baseline="sdpa-flash")
    assert made.percent(made.row("stock", 1)) == pytest.approx(-20.0)


def test_percent_is_unknown_where_one_of_the_two_has_no_result():
    made = samples.results()
    assert made.percent(made.row("naive", 4)) is None  # it timed one call and then ran out of memory
    assert made.percent(made.row("late", 4)) is None
    assert made.percent(Row(case="stock", batch=2, steps=50, seconds=[1.0])) is None
    made.row("stock", 1).status = Status.FAILED
    assert made.percent(made.row("fp16", 1)) is None


def test_an_unknown_row_or_baseline_names_those_there_are():
    with pytest.raises(InvalidOptionError, match=r"row\('stock', 2\).*one of stock at 1, sdpa-flash at 1"):
        samples.results().row("stock", 2)
    with pytest.raises(InvalidOptionError, match="no case 'warp'.*one of stock, sdpa-flash"):
        Results(job=samples.job(), baseline="warp", started="")


def test_an_equal_job_fits_also_after_a_journey_through_json():
    read = Results.from_json(samples.results().to_json())
    assert read.fits(samples.job()) == []
    reworded = (dataclasses.replace(samples.CASES[0], description="other words"), *samples.CASES[1:])
    assert read.fits(samples.job(cases=reworded)) == []


@pytest.mark.parametrize(
    ("changes", "reasons"),
    [
        ({"steps": 20}, ["steps: 50 in the results, 20 asked for now"]),
        (
            {"model": "other", "batches": (1,)},
            ["model: 'arch:sd15' in the results", r"batches: \[1, 4\] in the results, \[1\] asked for now"],
        ),
        ({"cases": samples.CASES[:2]}, ["cases: stock, sdpa-flash, fp16, .* stock, sdpa-flash asked for now"]),
        (
            {"cases": (Case(name="stock", dtype="bfloat16"), *samples.CASES[1:])},
            ["case stock, dtype: None in the results, 'bfloat16' asked for now"],
        ),
        ({"isolate": True}, ["isolate: False in the results, True asked for now"]),
    ],
)
def test_another_job_does_not_fit_and_says_why(changes, reasons):
    found = samples.results().fits(samples.job(**changes))
    assert len(found) == len(reasons)
    for text, pattern in zip(found, reasons, strict=True):
        assert re.search(pattern, text)


def test_every_field_of_a_job_counts():
    """A field added to Job and forgotten in the comparison would join two different runs."""
    other = {
        "model": "x", "task": "inpaint", "cases": samples.CASES[:1], "batches": (2,), "height": 8, "width": 8,
        "steps": 1, "guidance_scale": 2.0, "scheduler": "ddim", "prompt": "x", "seed": 9, "rounds": 1, "warmup": 7,
        "pairs": 1, "device": "cuda", "dtype": "float16", "isolate": True, "decode": False,
    }  # fmt: skip
    assert set(other) == {field.name for field in dataclasses.fields(Job)}
    for name, value in other.items():
        assert len(samples.results().fits(samples.job(**{name: value}))) == 1, name


def test_another_card_or_torch_does_not_fit_but_another_day_does():
    made = samples.results()
    assert made.fits(samples.job(), made.environment | {"date_utc": "later", "matmul_tflops": 1.0}) == []
    versions = made.environment["versions"] | {"torch": "2.14.0"}
    found = made.fits(samples.job(), made.environment | {"device_name": "Other GPU", "versions": versions})
    assert found == [
        "device_name: 'Example GPU' in the results, 'Other GPU' here",
        "torch: '2.13.0' in the results, '2.14.0' here",
    ]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"rounds": 0}, r"Job\(rounds=0\): found rounds = 0; needed: a whole number from 1 on"),
        ({"warmup": -1}, "warmup = -1; needed: a whole number from 0 on"),
        ({"steps": True}, "steps = True"),
        ({"height": 0}, "height = 0"),
        ({"batches": (1, 1)}, "each once"),
        ({"batches": ()}, "at least one batch size"),
        ({"batches": (0,)}, "batches = 0"),
        ({"task": "video"}, "one of txt2img, img2img, inpaint"),
        ({"cases": ()}, "at least one case"),
        ({"cases": (Case(name="a"), Case(name="a"))}, "each name once"),
    ],
)
def test_a_job_no_run_could_follow_is_refused(changes, text):
    with pytest.raises(InvalidOptionError, match=text):
        samples.job(**changes)


def test_a_case_has_its_own_dtype_or_the_jobs():
    assert samples.job().dtype_of("stock") == "float32"
    assert samples.job().dtype_of("fp16") == "float16"
    autocast = Case(name="autocast", dtype="float32", autocast="bfloat16")
    assert samples.job(cases=(autocast,)).dtype_of("autocast") == "bfloat16"
