"""A suite's published numbers beside what was measured here."""

from __future__ import annotations

from collections.abc import Iterator

from ..planning.units import gib
from .results import Results, Row
from .suites import Published, Section
from .wording import digits


def published_lines(section: Section, results: Results) -> list[str]:
    """Return a Markdown table of rows beside what was published for them, with links; nothing where nothing was.

    Gains are relative to the baseline of the results; published ones to the same case, on the device they are from.
    """
    rows = list(_rows(section, results))
    if not rows:
        return []
    heading = "| case | batch | here | gain here | published on | published | gain there |"
    sources = sorted({item.source for item in section.published})
    notes = [section.note] if section.note else []
    return ["", heading, "| :--- | ---: | ---: | ---: | :--- | ---: | ---: |", *rows, "", *notes, *sources]


def _rows(section: Section, results: Results) -> Iterator[str]:
    for row in results.rows:
        for item in section.published:
            if (item.case, item.batch) == (row.case, row.batch):
                percent = results.percent(row)
                here = "-" if percent is None else f"{percent:+.0f} %"
                there = _gain(section, item, results.baseline)
                cells = (row.case, str(row.batch), _here(row, item), here, item.device, _there(item), there)
                yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _here(row: Row, item: Published) -> str:
    """What was measured, in the unit that was published."""
    if not row.measured:
        return str(row.status)
    if item.seconds is not None:
        return f"{digits(row.median_s)} s" if row.median_s else "-"
    if item.iterations_per_s is not None:
        return f"{digits(row.iterations_per_s)} it/s" if row.iterations_per_s else "-"
    return gib(row.peak_allocated_bytes) if row.peak_allocated_bytes else "-"


def _there(item: Published) -> str:
    found = []
    if item.seconds is not None:
        found.append(f"{digits(item.seconds)} s")
    if item.iterations_per_s is not None:
        found.append(f"{digits(item.iterations_per_s)} it/s")
    if item.peak_bytes is not None:
        found.append(gib(item.peak_bytes))
    return ", ".join([*found, item.note] if item.note else found)


def _gain(section: Section, item: Published, case: str) -> str:
    baseline = next(
        (
            other
            for other in section.published
            if (other.case, other.batch, other.device) == (case, item.batch, item.device)
        ),
        None,
    )
    if baseline is None:
        return "-"
    if item.seconds and baseline.seconds:
        return f"{100 * (baseline.seconds / item.seconds - 1):+.0f} %"
    if item.iterations_per_s and baseline.iterations_per_s:
        return f"{100 * (item.iterations_per_s / baseline.iterations_per_s - 1):+.0f} %"
    return "-"
