"""Time and memory of attention by the number of tokens, one line a backend, with the slope that N^2 would have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from .figures import GREY, MARKERS, PALETTE, add_legend, add_notes, add_titles, new_figure, pick, quiet_frame
from .reading import refuse

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class AttentionPoint(Protocol):
    """What is drawn: one backend at one length. None stands for what could not be had, such as for lack of memory."""

    @property
    def backend(self) -> str: ...
    @property
    def tokens(self) -> int: ...
    @property
    def microseconds(self) -> float | None: ...
    @property
    def peak_bytes(self) -> int | None: ...


def attention_figure(points: Sequence[AttentionPoint], *, device: str | None = None) -> Figure:
    """Draw microseconds and peak bytes over tokens, both axes logarithmic, the slope of N^2 dashed.

    Args:
        points: measured calls, in any order; those without a time are named in a note.
        device: named in the title.

    Raises:
        InvalidOptionError: no point has a time.
        MissingPackageError: matplotlib is not installed.
    """
    points = sorted(points, key=lambda point: point.tokens)
    if not any(point.microseconds for point in points):
        raise refuse("drawing attention", "no measured point", "at least one backend that ran", "measure again")
    figure = new_figure(11.0, 4.8)
    from matplotlib.ticker import LogLocator

    left, right = figure.subplots(1, 2)
    _panel(left, points, lambda point: point.microseconds)
    _panel(right, points, lambda point: point.peak_bytes)
    # a line below each, so that both titles stand at one height
    add_titles(left, "Time of one attention call", [device or "Lower is better"])
    add_titles(right, "Peak memory of one attention call", ["Dashed: the slope of N squared"])
    left.set_ylabel("time (microseconds)")
    right.set_ylabel("peak memory (bytes)")
    right.set_yscale("log", base=2)
    right.yaxis.set_major_locator(LogLocator(base=2, numticks=9))
    right.yaxis.set_major_formatter(lambda value, position: binary_size(value))
    add_legend(right, {str(line.get_label()): line for line in left.get_lines() if line.get_label()[0] != "_"})
    add_notes(figure, _not_run(points))
    return figure


def _panel(axes: Axes, points: Sequence[AttentionPoint], value: Callable[[AttentionPoint], float | None]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=10)
    highest: list[tuple[int, float]] = []
    for index, backend in enumerate(dict.fromkeys(point.backend for point in points)):
        # a logarithmic axis has no zero
        line = [(p.tokens, float(found)) for p in points if p.backend == backend and (found := value(p))]
        if not line:
            continue
        highest = max(highest, line, key=lambda drawn: drawn[-1][1] if drawn else 0.0)
        x, y = zip(*line, strict=True)
        # ever smaller, so that lines on top of each other are all seen
        size = max(3.5, 9.0 - 1.2 * index)
        colour, marker = pick(PALETTE, index), pick(MARKERS, index)
        axes.plot(x, y, color=colour, marker=marker, markersize=size, linewidth=size / 3, label=backend)
    tokens = sorted({point.tokens for point in points})
    if highest:
        _draw_slope(axes, highest, tokens[0])
    axes.set_xticks(tokens, [str(number) for number in tokens], rotation=45 if len(tokens) > 6 else 0)
    axes.minorticks_off()
    axes.set_xlabel("tokens N")
    axes.grid(True, color="0.92")
    quiet_frame(axes)


def _draw_slope(axes: Axes, highest: list[tuple[int, float]], first: int) -> None:
    """Draw the slope of N^2 above the highest line, where it crosses none at the right end."""
    last, top = highest[-1]
    start = max(first, last // 8)
    x = (start, last)
    y = (2 * top * (start / last) ** 2, 2 * top)
    axes.plot(x, y, color=GREY, linestyle="--", linewidth=1)
    axes.annotate("N²", (x[1], y[1]), xytext=(-4, 4), textcoords="offset points", ha="right", color=GREY, fontsize=9)


def binary_size(value: float) -> str:
    """Print bytes on an axis.

    >>> binary_size(2**21), binary_size(1536)
    ('2 MiB', '1.5 KiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:.3g} {unit}"


def _not_run(points: Sequence[AttentionPoint]) -> list[str]:
    missing: dict[str, list[int]] = {}
    for point in points:
        if not point.microseconds:
            missing.setdefault(point.backend, []).append(point.tokens)
    return [f"{name}: not run at {', '.join(map(str, tokens))} tokens" for name, tokens in missing.items()]
