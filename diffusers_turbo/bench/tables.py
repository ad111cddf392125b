"""Results as text: CSV with raw numbers, Markdown to paste, a table for the terminal. One list of columns for all."""

from __future__ import annotations

import csv
import io
import re
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..planning.units import gib
from .extras import needs_extra
from .results import Results, Row
from .wording import digits, environment_line, job_line, model_name, outcome, protocol_line

if TYPE_CHECKING:
    from rich.table import Table

_NOTHING = "-"
_OUTCOME = "verdict"
_LONGEST_OUTCOME = 200
_NARROWEST_OUTCOME = 24


@dataclass(frozen=True, kw_only=True)
class Column:
    """One fact of a row.

    Attributes:
        name: its heading in CSV, with the unit; None keeps it out of CSV.
        title: its heading for readers; None keeps it out of what they see.
        value: how to get it; None where the row does not have it.
        text: how to print it for readers.
        number: whether it is aligned to the right.
        spare: where a terminal is too narrow, columns go, the largest number first; 0 stays.
    """

    name: str | None = None
    title: str | None = None
    value: Callable[[Results, Row], Any]
    text: Callable[[Any], str] = str
    number: bool = True
    spare: int = 0


def _field(name: str) -> Callable[[Results, Row], Any]:
    return lambda results, row: getattr(row, name)


def _timed(name: str) -> Callable[[Results, Row], Any]:
    """For readers: nothing where the row's timings are not its result."""
    return lambda results, row: getattr(row, name) if row.measured else None


def _distance(name: str) -> Callable[[Results, Row], Any]:
    """From `Verification.as_dict()`, where the pipeline's own distance is under `ours`."""

    def value(results: Results, row: Row) -> Any:
        found = row.distance or {}
        return ((found.get("ours") or {}) | found).get(name)

    return value


def _version(name: str) -> Callable[[Results, Row], Any]:
    return lambda results, row: (results.environment.get("versions") or {}).get(name)


def _joined(values: Iterable[object]) -> str:
    return ";".join(map(str, values))


def _median_or_status(results: Results, row: Row) -> str:
    return digits(row.median_s) if row.measured and row.median_s is not None else str(row.status)


def _spread(results: Results, row: Row) -> str | None:
    if not row.measured or row.low_s is None or row.high_s is None or len(row.seconds) < 2:
        return None
    return f"{digits(row.low_s)} to {digits(row.high_s)}"


def _compared(results: Results, row: Row) -> str | None:
    if row.case == results.baseline:
        return "baseline"
    percent = results.percent(row) if row.measured else None
    return None if percent is None else f"{percent:+.1f} %"


def _dtype(results: Results, row: Row) -> str:
    """What the case ran in, where that was measured, at whatever batch; else what its settings say."""
    measured = ((other.distance or {}).get("dtype") for other in results.rows if other.case == row.case)
    return next(filter(None, measured), None) or results.job.dtype_of(row.case)


def _outcome(results: Results, row: Row) -> str | None:
    found, dtype = outcome(row, results.job.rounds), _dtype(results, row)
    # exact in half precision is as near as stock is there, which is not what exact in fp32 is
    verdict, mark, rest = found.partition(";")
    return f"exact in {dtype}{mark}{rest}" if verdict == "exact" and dtype != "float32" else found or None


def _short(text: str) -> str:
    return textwrap.shorten(text, _LONGEST_OUTCOME, placeholder=" ...")


COLUMNS = (
    Column(name="case", title="case", value=_field("case"), number=False),
    Column(name="dtype", title="dtype", value=_dtype, number=False, spare=3),
    Column(name="batch", title="batch", value=_field("batch")),
    Column(name="steps", value=_field("steps")),
    Column(name="status", value=_field("status")),
    Column(name="reason", value=lambda results, row: " ".join((row.reason or "").split()) or None),
    Column(title="median s", value=_median_or_status),
    Column(title="quartiles s", value=_spread, spare=5),
    Column(name="median_s", value=_field("median_s")),
    Column(name="low_quartile_s", value=_field("low_s")),
    Column(name="high_quartile_s", value=_field("high_s")),
    Column(name="median_95_percent_interval_s", value=lambda results, row: _joined(row.median_interval_s or ())),
    Column(name="seconds_per_round_s", value=lambda results, row: _joined(row.seconds)),
    Column(name="iterations_per_s", title="it/s", value=_timed("iterations_per_s"), text=digits, spare=2),
    Column(name="images_per_s", title="images/s", value=_timed("images_per_s"), text=digits, spare=6),
    Column(name="gpu_busy_s", value=_field("busy_s")),
    Column(title="GPU busy", value=_timed("busy_share"), text=lambda value: f"{value:.0%}", spare=4),
    Column(name="faster_than_baseline_percent", value=lambda results, row: results.percent(row)),
    Column(title="vs baseline", value=_compared),
    Column(name="first_image_s", title="first image s", value=_field("first_image_s"), text=digits, spare=3),
    Column(name="warmup_calls_s", value=lambda results, row: _joined(row.warmup_s)),
    Column(name="load_s", value=_field("load_s")),
    Column(name="apply_s", value=_field("apply_s")),
    Column(name="peak_allocated_bytes", title="peak VRAM", value=_field("peak_allocated_bytes"), text=gib),
    Column(name="peak_reserved_bytes", value=_field("peak_reserved_bytes")),
    Column(name="peak_host_bytes", title="peak host", value=_field("peak_host_bytes"), text=gib, spare=7),
    Column(name="psnr_db", title="dB", value=_distance("psnr_db"), text=lambda value: f"{value:.1f}", spare=1),
    Column(name="worst_psnr_db", value=_distance("worst_psnr_db")),
    Column(name="latents_relative_distance", value=_distance("latents")),
    Column(name="ssim", value=_distance("ssim")),
    Column(name="flip", value=_distance("flip")),
    Column(name="verdict", value=_field("verdict")),
    Column(name="verdict_reasons", value=lambda results, row: "; ".join(row.verdict_reasons) or None),
    Column(title=_OUTCOME, value=_outcome, text=_short, number=False),
    Column(name="baseline", value=lambda results, row: results.baseline),
    Column(name="model", value=lambda results, row: model_name(results.job)),
    Column(name="task", value=lambda results, row: results.job.task),
    Column(name="height_px", value=lambda results, row: results.job.height),
    Column(name="width_px", value=lambda results, row: results.job.width),
    Column(name="device_name", value=lambda results, row: results.environment.get("device_name")),
    Column(name="torch", value=_version("torch")),
    Column(name="cuda", value=_version("cuda")),
    Column(name="diffusers", value=_version("diffusers")),
    Column(name="diffusers_turbo", value=_version("diffusers_turbo")),
    Column(name="date_utc", value=lambda results, row: results.environment.get("date_utc")),
)
"""Every fact of a row, in the order of reading."""


def csv_text(results: Results) -> str:
    """Return CSV: a heading with units, raw numbers, an empty cell for what is not known, rounds joined by `;`."""
    columns = [column for column in COLUMNS if column.name is not None]
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow([column.name for column in columns])
    writer.writerows([column.value(results, row) for column in columns] for row in results.rows)
    return lines.getvalue()


def markdown(results: Results) -> str:
    """Return Markdown to paste: where it ran, what ran, the table, how it was measured, notes."""
    columns = _columns_for_readers(results)
    lines = [f"**{_escaped(job_line(results))}**", "", _escaped(environment_line(results)), ""]
    lines.append(_line(str(column.title) for column in columns))
    lines.append(_line("---:" if column.number else ":---" for column in columns))
    lines += [_line(_escaped(_cell(column, results, row)) for column in columns) for row in results.rows]
    lines += ["", _escaped(protocol_line(results)), ""]
    lines += [f"- {_escaped(note)}" for note in _notes(results)]
    return "\n".join(lines).rstrip() + "\n"


def rich_table(results: Results, width: int | None = None) -> Table:
    """Return the table for a terminal, as an object of the package rich.

    Args:
        results: what to show.
        width: characters in a line; None asks the terminal. Where it is narrow, what can be spared is left out.

    Raises:
        MissingPackageError: rich is not installed.
    """
    with needs_extra("rich_table()"):
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

    columns = _that_fit(_columns_for_readers(results), results, Console().width if width is None else width)
    said = [] if any(column.title == _OUTCOME for column in columns) else _outcomes(results)
    caption = "\n".join([*said, environment_line(results), protocol_line(results), *_notes(results)])
    # as Text, since square brackets in a name would be read as markup
    table = Table(title=Text(job_line(results)), caption=Text(caption), caption_justify="left")
    for column in columns:
        # a name or a number broken over two lines is hard to read; reasons may be
        wraps = column.title == _OUTCOME
        table.add_column(str(column.title), justify="right" if column.number else "left", no_wrap=not wraps)
    for row in results.rows:
        table.add_row(*(Text(_cell(column, results, row)) for column in columns), style=_style(results, row))
    return table


def _that_fit(columns: list[Column], results: Results, width: int) -> list[Column]:
    kept = list(columns)
    while sum(_width(column, results) for column in kept) + 1 > width and any(column.spare for column in kept):
        kept.remove(max(kept, key=lambda column: column.spare))
    if sum(_width(column, results) for column in kept) + 1 > width:
        # sentences in a strip of one word a line help nobody: they go below the table
        kept = [column for column in kept if column.title != _OUTCOME]
    return kept


def _outcomes(results: Results) -> list[str]:
    """What there is to say of each row, a line for each."""
    several = len(results.job.batches) > 1
    found = [(row, _outcome(results, row)) for row in results.rows]
    return [f"{row.case}{f' x {row.batch}' if several else ''}: {_short(text)}" for row, text in found if text]


def _width(column: Column, results: Results) -> int:
    longest = max(len(text) for text in (str(column.title), *(_cell(column, results, row) for row in results.rows)))
    # two blanks and a line; reasons wrap, but not into a narrow strip
    return 3 + (min(longest, _NARROWEST_OUTCOME) if column.title == _OUTCOME else longest)


def _style(results: Results, row: Row) -> str:
    if not row.measured:
        return "dim"
    if row.verdict == "different":
        return "yellow"
    return "bold" if row.case == results.baseline else ""


def _columns_for_readers(results: Results) -> list[Column]:
    """Leave out what no row has: video memory on a CPU, a distance where none was measured."""
    shown = [column for column in COLUMNS if column.title is not None]
    return [
        column
        for column in shown
        if not results.rows or any(column.value(results, row) is not None for row in results.rows)
    ]


def _cell(column: Column, results: Results, row: Row) -> str:
    value = column.value(results, row)
    return _NOTHING if value is None else column.text(value)


def _notes(results: Results) -> list[str]:
    unfinished = sum(not row.seconds and row.status == "not run" for row in results.rows)
    notes = [f"this run is not finished: {unfinished} of {len(results.rows)} rows not run"] if unfinished else []
    return [*notes, *results.notes, *results.environment.get("notes", ())]


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escaped(text: str) -> str:
    """Keep a text in its cell and as it is: one line, no column ends, no emphasis, no HTML."""
    text = " ".join(text.split())
    # an underscore inside a word is no emphasis and stays readable
    return re.sub(r"[\\|*`<\[]|(?<!\w)_|_(?!\w)", r"\\\g<0>", text)
