"""Labels beside points, none on top of another: each takes the first free place of a few around its point."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from .figures import GREY, INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FONT_SIZE = 8
_HALF_MARKER_POINTS = 6.5  # the baseline's ring is the widest
# right, left, above, below, then the corners
_DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))
_GAP_POINTS = 1.5  # to the left and right of a label, so that two of them do not read as one
_DISTANCES_POINTS = (8, 13, 20, 30, 42, 56, 72)

Box = tuple[float, float, float, float]
"""Left, bottom, right and top."""


def overlaps(one: Box, other: Box) -> bool:
    """Whether two boxes share more than an edge.

    >>> overlaps((0, 0, 2, 2), (1, 1, 3, 3)), overlaps((0, 0, 2, 2), (2, 0, 4, 2))
    (True, False)
    """
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def place_labels(axes: Axes, points: Iterable[tuple[float, float, str]]) -> bool:
    """Write each point's text beside it, with a thin line to it where the nearest places are taken.

    Returns whether all found a free place; where one did not, it overlaps as little as possible.

    Args:
        axes: finished, with limits, title and legend, since places are found in pixels.
        points: x and y in data coordinates, and the text.
    """
    points = list(points)
    axes.autoscale(False)
    # Lets the layout settle. All lengths grow with the resolution alike, so what is free now is free in the file.
    axes.figure.draw_without_rendering()  # type: ignore[union-attr]
    scale = axes.figure.dpi / 72
    frame = tuple(axes.get_window_extent().extents)
    half = _HALF_MARKER_POINTS * scale
    spots = [tuple(axes.transData.transform((x, y))) for x, y, _ in points]
    taken: list[Box] = [(x - half, y - half, x + half, y + half) for x, y in spots]
    all_free = True
    for (x, y, text), spot in zip(points, spots, strict=True):
        size = _size(axes, text)
        places = list(_places(spot, size, scale))
        inside = [place for place in places if _lies_in(place[1], frame)] or places
        distance, box = min(inside, key=lambda place: sum(overlaps(place[1], other) for other in taken))
        all_free = all_free and not any(overlaps(box, other) for other in taken)
        taken.append(box)
        line = {"arrowstyle": "-", "color": GREY, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3}
        label = axes.annotate(
            text,
            (x, y),
            xytext=((box[0] - spot[0]) / scale + _GAP_POINTS, (box[1] - spot[1]) / scale),
            textcoords="offset points",
            va="bottom",
            fontsize=_FONT_SIZE,
            color=INK,
            arrowprops=line if distance > _DISTANCES_POINTS[1] else None,
            parse_math=False,
        )
        label.set_in_layout(False)  # it lies inside the frame and must not move it
    return all_free


def _size(axes: Axes, text: str) -> tuple[float, float]:
    trial = axes.text(0, 0, text, fontsize=_FONT_SIZE, parse_math=False)
    extent = trial.get_window_extent()
    trial.remove()
    return float(extent.width), float(extent.height)


def _places(spot: tuple[float, ...], size: tuple[float, float], scale: float) -> Iterator[tuple[float, Box]]:
    """Iterate over places around a spot, nearest first, with their distance in points."""
    width, height = size
    gap = _GAP_POINTS * scale
    for distance in _DISTANCES_POINTS:
        for right, up in _DIRECTIONS:
            away = distance * scale * (0.7 if right and up else 1.0)  # corners are as near as sides
            left = spot[0] + right * away - (0.5 - 0.5 * right) * width
            bottom = spot[1] + up * away - (0.5 - 0.5 * up) * height
            yield distance, (left - gap, bottom, left + width + gap, bottom + height)


def _lies_in(box: Box, frame: tuple[float, ...]) -> bool:
    return box[0] >= frame[0] and box[1] >= frame[1] and box[2] <= frame[2] and box[3] <= frame[3]
