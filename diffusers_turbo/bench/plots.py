"""Results as pictures: seconds a picture, and time against memory. Each plot as a Figure, and as a file.

matplotlib is imported only when something is drawn, and pyplot, which keeps figures and settings process-wide, never.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .attention_plot import AttentionPoint, attention_figure
from .figures import (
    GREY,
    INK,
    MARKERS,
    PALETTE,
    add_legend,
    add_notes,
    add_titles,
    new_figure,
    pick,
    quiet_frame,
    save_figure,
)
from .label_placement import place_labels
from .results import Results, Row, Status
from .wording import device_line, digits, job_line

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_GIB = 2**30
_BAR = 0.8  # of the room between two configurations, for all batch sizes together
_ROW_INCHES = 0.3


def plot_bars(results: Results, path: str | Path) -> None:
    """Write `bar_figure` to a file: PNG, SVG or PDF by the name's ending.

    Raises:
        InvalidOptionError: another ending, or a folder that cannot be written to.
        MissingPackageError: matplotlib is not installed.
    """
    save_figure(lambda: bar_figure(results), path)


def plot_memory(results: Results, path: str | Path) -> None:
    """Write `memory_figure` to a file: PNG, SVG or PDF by the name's ending.

    Raises:
        InvalidOptionError: another ending, or a folder that cannot be written to.
        MissingPackageError: matplotlib is not installed.
    """
    save_figure(lambda: memory_figure(results), path)


def bar_figure(results: Results) -> Figure:
    """Draw the median seconds a picture by configuration and batch size, whiskers from quartile to quartile.

    A row without timings says in its place what became of it; dashed lines carry the baseline through all rows.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    cases = list(dict.fromkeys(row.case for row in results.rows))
    batches = _batches(results)
    figure = new_figure(9.0, 1.9 + _ROW_INCHES * max(1, len(cases)) * max(1.5, len(batches)))
    axes = figure.add_subplot()
    height = _BAR / max(1, len(batches))
    entries: dict[str, Artist] = {}
    for index, batch in enumerate(batches):
        colour = pick(PALETTE, index)
        for row in (row for row in results.rows if row.batch == batch):
            y = cases.index(row.case) - _BAR / 2 + height * (index + 0.5)
            if row.measured:
                entries[f"batch {batch}"] = _draw_bar(axes, results, row, y, height, colour)
            else:
                text = f" batch {batch}: {row.status}"
                axes.annotate(text, (0, y), va="center", fontsize=8, style="italic", color=GREY, parse_math=False)
            if row.case == results.baseline and row.measured:
                across = axes.axvline(_per_picture(row), color=colour, linestyle="--", linewidth=1, zorder=0.5)
                entries.setdefault("baseline", across)
    names = [f"{name} (baseline)" if name == results.baseline else name for name in cases]
    axes.set_yticks(range(len(cases)), names, parse_math=False)
    for tick, name in zip(axes.get_yticklabels(), cases, strict=True):
        tick.set_fontweight("bold" if name == results.baseline else "normal")
    axes.set_ylim(max(1, len(cases)) - 0.5, -0.5)  # the first configuration on top
    axes.margins(x=0.2)
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds per picture (median; whiskers: quartiles)")
    axes.xaxis.grid(True, color="0.9")
    quiet_frame(axes)
    add_titles(axes, "Time per picture", [job_line(results), device_line(results)])
    add_legend(axes, entries)
    if len(cases) > 1:
        add_notes(figure, ["In brackets: how much faster than the baseline at the same batch size."])
    return figure


def _draw_bar(axes: Axes, results: Results, row: Row, y: float, height: float, colour: str) -> Artist:
    median_s, low_s, high_s = ((value or 0.0) / row.batch for value in (row.median_s, row.low_s, row.high_s))
    whiskers = {"ecolor": INK, "elinewidth": 1, "capsize": 2}
    errors = [[median_s - low_s], [high_s - median_s]]
    bars = axes.barh(y, median_s, height * 0.92, xerr=errors, color=colour, error_kw=whiskers)
    percent = results.percent(row)
    text = digits(median_s)
    if row.case != results.baseline and percent is not None:
        text += f"  ({percent:+.0f} %)"
    if row.status is not Status.OK:
        text += f"  {len(row.seconds)} of {results.job.rounds} rounds"
    axes.annotate(
        text,
        (high_s, y),
        xytext=(5, 0),
        textcoords="offset points",
        va="center",
        fontsize=8,
        color=INK,
        # the baseline's dashed line stops before a number
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
    )
    return bars.patches[0]


def memory_figure(results: Results) -> Figure:
    """Draw the median seconds a picture against peak memory, one labelled point a row; the best are lower left.

    Where the names would lie on top of each other, numbers stand for them. Rows that ran out of memory, and rows
    without a peak, are named in a note.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    figure, readable = _draw_memory(results, numbered=False)
    return figure if readable else _draw_memory(results, numbered=True)[0]


def _draw_memory(results: Results, *, numbered: bool) -> tuple[Figure, bool]:
    """Draw it, and say whether all labels found a place."""
    on_device = any(row.peak_allocated_bytes is not None for row in results.rows)
    peak = "peak_allocated_bytes" if on_device else "peak_host_bytes"
    names = list(dict.fromkeys(row.case for row in results.rows if _has_point(row, peak)))
    figure = new_figure(9.0, max(5.8, 2.6 + 0.2 * len(names)) if numbered else 5.8)
    axes = figure.add_subplot()
    entries: dict[str, Artist] = {}
    points: list[tuple[float, float, str]] = []
    for index, batch in enumerate(_batches(results)):
        colour, marker = pick(PALETTE, index), pick(MARKERS, index)
        for row in (row for row in results.rows if row.batch == batch and _has_point(row, peak)):
            x, y = _per_picture(row), getattr(row, peak) / _GIB
            points.append((x, y, str(names.index(row.case) + 1) if numbered else row.case))
            spot = axes.scatter(x, y, s=46, color=colour, marker=marker, edgecolors="white", zorder=3)
            entries.setdefault(f"batch {batch}", spot)
            if row.case == results.baseline:
                ring = axes.scatter(x, y, s=140, facecolors="none", edgecolors=INK, linewidths=1, zorder=2)
                entries["baseline"] = ring
    if not numbered:  # in a crowd the zero is given up for room
        axes.update_datalim([(0.0, 0.0)])  # so that the margin is one of all that is drawn
    axes.margins(0.12)
    if not numbered:
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
    axes.set_xlabel("seconds per picture (median)")
    axes.set_ylabel(f"peak memory (GiB, {'allocated on the device' if on_device else 'of the process'})")
    axes.grid(True, color="0.92")
    quiet_frame(axes)
    add_titles(axes, "Time against peak memory", [job_line(results), device_line(results)])
    key = [f"{number}  {name}" for number, name in enumerate(names, start=1)] if numbered else []
    add_legend(axes, entries, key)
    add_notes(figure, _missing(results, peak))
    return figure, place_labels(axes, points)


def _batches(results: Results) -> list[int]:
    return sorted({row.batch for row in results.rows})


def _per_picture(row: Row) -> float:
    return (row.median_s or 0.0) / row.batch


def _has_point(row: Row, peak: str) -> bool:
    return row.measured and getattr(row, peak) is not None


def _missing(results: Results, peak: str) -> list[str]:
    """Name the rows that have no point, by what became of them."""
    groups: dict[str, list[str]] = {}
    for row in results.rows:
        if _has_point(row, peak):
            continue
        why = "no peak measured" if row.measured else str(row.status)
        groups.setdefault(why, []).append(f"{row.case} (batch {row.batch})")
    return [f"{why}: {', '.join(names)}" for why, names in groups.items()]


def plot_attention(points: Sequence[AttentionPoint], path: str | Path, *, device: str | None = None) -> None:
    """Write `attention_figure` to a file: PNG, SVG or PDF by the name's ending.

    Raises:
        InvalidOptionError: no measured point, another ending, or a folder that cannot be written to.
        MissingPackageError: matplotlib is not installed.
    """
    save_figure(lambda: attention_figure(points, device=device), path)
