from __future__ import annotations

import csv
import dataclasses
import io
import sys

import pytest

from diffusers_turbo.bench.results import Results, Row, Status
from diffusers_turbo.bench.tables import COLUMNS, csv_text, markdown, rich_table
from diffusers_turbo.bench.wording import environment_line, protocol_line
from diffusers_turbo.errors import MissingPackageError
from tests.bench import samples


def csv_rows(results: Results) -> dict[tuple[str, str], dict[str, str]]:
    rows = list(csv.DictReader(io.StringIO(csv_text(results))))
    return {(row["case"], row["batch"]): row for row in rows}


def markdown_table(text: str) -> list[dict[str, str]]:
    """Read the one table of a Markdown text, checking that all its lines have as many cells."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.replace(r"\|", "!").strip("|").split("|")] for line in lines]
    heading, rule, *rows = cells
    assert all(set(mark) <= {":", "-"} for mark in rule)
    return [dict(zip(heading, row, strict=True)) for row in rows]


def test_csv_holds_every_round_and_raw_numbers():
    made = samples.results()
    rows = csv_rows(made)
    assert len(rows) == len(made.rows)
    for row in made.rows:
        found = rows[row.case, str(row.batch)]
        assert [float(part) for part in found["seconds_per_round_s"].split(";") if part] == row.seconds
        assert found["status"] == row.status
        for name in ("median_s", "first_image_s", "peak_allocated_bytes", "peak_reserved_bytes", "load_s"):
            expected = getattr(row, name)
            assert found[name] == ("" if expected is None else str(expected))
    assert float(rows["sdpa-flash", "1"]["faster_than_baseline_percent"]) == pytest.approx(25.0)
    assert float(rows["stock", "1"]["psnr_db"]) == float("inf")
    assert rows["fp16", "1"]["dtype"] == "float16"


def test_what_a_case_was_measured_to_run_in_holds_for_all_its_batches():
    made = samples.results()
    made.row("automatic", 1).distance = {"dtype": "bfloat16"}
    rows = csv_rows(made)
    assert rows["automatic", "1"]["dtype"] == rows["automatic", "4"]["dtype"] == "bfloat16"
    assert rows["stock", "4"]["dtype"] == "float32"


def test_csv_says_what_became_of_rows_without_a_result():
    rows = csv_rows(samples.results())
    out = rows["naive", "4"]
    assert out["reason"] == "OutOfMemoryError: tried to allocate 64.00 GiB"
    assert out["faster_than_baseline_percent"] == out["images_per_s"] == ""
    assert rows["late", "4"]["status"] == "not run"


def test_csv_headings_carry_units_and_are_unique():
    names = [column.name for column in COLUMNS if column.name]
    assert len(set(names)) == len(names)
    for name in names:
        if any(word in name for word in ("median", "quartile", "image_s", "warmup", "load", "apply", "round")):
            assert name.endswith("_s")
        if "peak" in name:
            assert name.endswith("_bytes")


def test_csv_carries_versions_and_device_on_each_row():
    for row in csv_rows(samples.results()).values():
        assert (row["device_name"], row["torch"], row["cuda"], row["diffusers"]) == (
            "Example GPU",
            "2.13.0",
            "13.0",
            "0.42.1",
        )


def test_markdown_is_one_line_a_row_with_numbers_units_and_reasons():
    made = samples.results()
    table = markdown_table(markdown(made))
    assert [(row["case"], row["batch"]) for row in table] == [(row.case, str(row.batch)) for row in made.rows]
    found = {(row["case"], row["batch"]): row for row in table}
    flash = found["sdpa-flash", "4"]
    assert (flash["median s"], flash["quartiles s"], flash["vs baseline"]) == ("6.40", "6.34 to 6.56", "+25.0 %")
    assert (flash["it/s"], flash["images/s"], flash["first image s"]) == ("7.81", "0.625", "7.40")
    assert (flash["peak VRAM"], flash["dB"], flash["verdict"]) == ("8.75 GiB", "96.2", "exact")
    assert found["stock", "1"]["vs baseline"] == "baseline"
    assert found["fp16", "1"]["verdict"] == "different: 31.5 dB ! from the reference; below 40 dB"
    out = found["naive", "4"]
    assert out["median s"] == "out of memory"
    assert out["verdict"] == "OutOfMemoryError: tried to allocate 64.00 GiB"
    assert out["vs baseline"] == out["images/s"] == "-"
    assert found["xformers", "1"]["median s"] == "unsupported"
    assert found["xformers", "4"]["verdict"] == r"RuntimeError: \[b] broke"
    assert found["late", "1"]["verdict"] == "1 of 3 rounds: interrupted"
    assert found["late", "4"]["median s"] == "not run"


def test_markdown_says_where_what_how_and_what_is_missing():
    text = markdown(samples.results())
    assert text.startswith("**arch:sd15, txt2img, the model's own size, 50 steps, seed 1**\n\nExample GPU, SM 9.0")
    for part in ("driver 550.54", "power limit 700 W", "612 TFLOPS", "2900 GB/s", "torch 2.13.0", "2026-01-02"):
        assert part in text
    assert "xformers None" not in text
    assert "Protocol: 1 to 3 rounds of whole calls (prompt to picture), configurations interleaved" in text
    assert "- this run is not finished: 1 of 14 rows not run\n- a note on the device\n" in text


def test_a_long_reason_is_cut_for_readers_and_whole_in_csv():
    made = samples.results()
    made.row("xformers", 1).reason = "no " * 200
    found = {(row["case"], row["batch"]): row for row in markdown_table(markdown(made))}
    assert len(found["xformers", "1"]["verdict"]) <= 200
    assert found["xformers", "1"]["verdict"].endswith("no ...")
    assert len(csv_rows(made)["xformers", "1"]["reason"]) == 599


def test_columns_that_no_row_has_are_left_out():
    made = samples.results()
    for row in made.rows:
        row.peak_allocated_bytes = row.distance = None
    heading = markdown_table(markdown(made))[0]
    assert "peak VRAM" not in heading
    assert "dB" not in heading
    assert "peak host" in heading
    assert "No distance measured" in markdown(made)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "3 rounds of whole calls (prompt to picture), configurations interleaved; median and quartiles."),
        ({"isolate": True}, "each configuration isolated in its own process"),
        ({"decode": False}, "prompt to latents, without the VAE"),
    ],
)
def test_the_protocol_says_how_it_was_measured(changes, said):
    made = samples.results()
    made = dataclasses.replace(made, job=samples.job(**changes), rows=made.rows[:8])
    assert said in protocol_line(made)
    assert "Warm-up excluded: the first call (first image) and 1 further warm-up call." in protocol_line(made)
    assert "over 8 prompt-and-seed pairs against fp32, naive attention" in protocol_line(made)


def test_the_protocol_of_a_run_without_warm_up_says_so():
    row = Row(case="stock", batch=1, steps=50, status=Status.OK, seconds=[1.0, 1.0])
    assert "No warm-up." in protocol_line(Results(job=samples.job(), rows=[row], started=""))


def test_a_run_without_rows_and_environment_still_prints():
    made = Results(job=samples.job(), started="")
    assert environment_line(made) == "cpu"
    assert markdown_table(markdown(made)) == []
    assert csv_text(made).count("\n") == 1
    assert rich_table(made, width=80).row_count == 0


def test_the_folder_of_a_model_is_not_printed():
    made = dataclasses.replace(samples.results(), job=samples.job(model="/home/someone/models/sd15"))
    for text in (markdown(made), csv_text(made)):
        assert "someone" not in text
        assert "sd15, txt2img" in text or ",sd15,txt2img," in text


def printed(results: Results, width: int) -> str:
    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(rich_table(results, width=width))
    return out.getvalue()


def test_the_terminals_table_holds_the_same_cells():
    made = samples.results()
    text = printed(made, 220)
    for row in markdown_table(markdown(made)):
        line = next(
            line for line in text.splitlines() if line.startswith(f"│ {row['case']} ") and f" {row['batch']} │" in line
        )
        for name in ("median s", "vs baseline", "peak VRAM"):
            assert row[name] in line
    assert "RuntimeError: [b] broke" in text


@pytest.mark.parametrize("width", [80, 100, 120])
def test_a_narrow_terminal_loses_columns_and_no_numbers(width):
    text = printed(samples.results(), width)
    assert all(len(line) <= width for line in text.splitlines())
    table = text[: text.index("└")]
    assert "…" not in "".join(line.rsplit("│", 2)[0] for line in table.splitlines())  # all but the verdict
    for cell in ("sdpa-flash", "out of memory", "+156.4 %", "10.50 GiB"):
        assert cell in table
    assert ("quartiles s" in table) == (width > 120)


def test_where_a_verdict_would_be_a_strip_it_stands_below():
    text = printed(samples.results(), 72)
    table, below = text[: text.index("└")], text[text.index("└") :]
    assert "verdict" not in table
    assert "RuntimeError: [b] broke" in " ".join(below.split())


def test_without_rich_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.table", None)
    with pytest.raises(MissingPackageError, match=r'pip install "diffusers-turbo\[cli\]"'):
        rich_table(samples.results())
