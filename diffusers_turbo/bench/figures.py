"""What all plots share: size, colours, titles, the legend's place, and how a figure becomes a file."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .extras import needs_extra
from .reading import refuse
from .writing import write_whole

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart by all common kinds of colour vision (https://jfly.uni-koeln.de/color/), the dark
# ones first and without the yellow, which is faint on white.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
MARKERS = "os^Dv<>P"
INK = "#222222"
GREY = "#666666"

_SMALL = 9
_FORMATS = (".png", ".svg", ".pdf")
_DOTS_PER_INCH = 200  # in print at column width, and sharp on a screen


def pick(choices: Sequence[str], index: int) -> str:
    """Return a colour or marker; after the last one they begin anew."""
    return choices[index % len(choices)]


def new_figure(width_inches: float, height_inches: float) -> Figure:
    """Return a white figure that lays itself out, known to no pyplot.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    with needs_extra("drawing a plot"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    figure = Figure(figsize=(width_inches, height_inches), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def add_titles(axes: Axes, title: str, lines: Sequence[str] = ()) -> None:
    """Write a title, and below it in grey what ran and where, both from the left edge of the axes on."""
    below = _lines(lines, 100)
    axes.annotate(
        below,
        (0, 1),
        xytext=(0, 8),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=_SMALL,
        color=GREY,
        linespacing=1.3,
        parse_math=False,
    )
    pad = 14 + 1.5 * _SMALL * (below.count("\n") + 1 if below else 0)
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold", color=INK, pad=pad, parse_math=False)


def add_legend(axes: Axes, entries: Mapping[str, Artist], key: Sequence[str] = ()) -> None:
    """Explain colours and marks to the right of the axes, where nothing is drawn.

    Args:
        axes: what was drawn on.
        entries: a text for each colour or mark; the baseline's comes last.
        key: lines below, without a mark.
    """
    from matplotlib.lines import Line2D

    names = sorted(entries, key="baseline".__eq__)
    if not names:
        return
    legend = axes.legend(
        [*(entries[name] for name in names), *(Line2D([], [], linestyle="none") for _ in key)],
        [*names, *key],
        loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
        borderaxespad=0,
        frameon=False,
        fontsize=_SMALL,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def add_notes(figure: Figure, notes: Sequence[str]) -> None:
    """Write small lines below everything."""
    if notes:
        figure.supxlabel(_lines(notes, 120), x=0.01, ha="left", fontsize=8, color=GREY, parse_math=False)


def quiet_frame(axes: Axes) -> None:
    """Leave of the frame only the two axes, and the grid behind everything."""
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def save_figure(draw: Callable[[], Figure], path: str | Path) -> None:
    """Draw, and write the file whole or not at all; nothing is drawn where the name's ending is unknown.

    Raises:
        InvalidOptionError: the name does not end in .png, .svg or .pdf, or its folder cannot be written to.
        MissingPackageError: matplotlib is not installed.
    """
    ending = Path(path).suffix.lower()
    if ending not in _FORMATS:
        needed = f"a name ending in {', '.join(_FORMATS)}"
        raise refuse(f"drawing {path}", f"the ending {ending!r}", needed, "correct the file's name")
    content = io.BytesIO()
    draw().savefig(content, format=ending[1:], dpi=_DOTS_PER_INCH)
    write_whole(path, content.getvalue(), "the plot")


def _lines(texts: Sequence[str], width: int) -> str:
    return "\n".join(line for text in texts for line in textwrap.wrap(text, width))
