"""The measured ladder of memory: seconds a picture by the memory of the card, for our plan and for each way by hand.

    cd docs/benchmarks && python measured_ladder.py simulated-cards-h200.json measured-ladder.png

Drawn from what `simulated_cards.py` wrote. Our plan and other packages ran at each budget. What diffusers can switch on
takes one size of memory, whatever there is: a line at its uncapped time, from the card on that just holds its peak.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from simulated_cards_tables import GB, OURS, RESIDENT, Row, has_pictures, whole

from diffusers_turbo.bench.figures import (
    GREY,
    PALETTE,
    add_legend,
    add_notes,
    add_titles,
    new_figure,
    quiet_frame,
    save_figure,
)
from diffusers_turbo.bench.reading import refuse

TITLES = {
    "sd15-512": "SD1.5, 512x512, 50 steps",
    "sd15-1024": "SD1.5, 1024x1024, 50 steps",
    "sdxl-1024": "SDXL, 1024x1024, 30 steps",
}
"""The jobs of `simulated_cards.py`, in the order of the panels; others follow."""

TILES = ", tiles"
NAMES = {RESIDENT: "everything on the GPU"}
COLOURS = {
    OURS: PALETTE[-1],
    RESIDENT: PALETTE[0],
    "model offload": PALETTE[3],
    "leaf offload": PALETTE[4],
    "sequential offload": PALETTE[5],
    "mmgp": PALETTE[2],
    "diffusers-mm": PALETTE[1],
}
"""Those of `ladder.py`, and two more; any other way is grey."""

SECONDS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200)


@dataclass(kw_only=True)
class Line:
    """One way to do a job.

    Attributes:
        points: GB and seconds a picture, of each budget that it drew under; or of the smallest that just holds it.
        everywhere: whether it takes the same from its only point on.
        lossy: the GB at which its picture came from lossy tiles.
        lost: the budgets under which it ran out of memory.
    """

    points: list[tuple[float, float]]
    everywhere: bool = False
    lossy: set[float] = field(default_factory=set)
    lost: list[float] = field(default_factory=list)

    def height(self, budget: float) -> float:
        """Return where a budget without a picture lies: at the time of the next larger one, or of the largest.

        >>> Line(points=[(2, 8.0), (4, 3.0)]).height(1)
        8.0
        """
        return next((seconds for size, seconds in self.points if size >= budget), self.points[-1][1])


def read_lines(data: Row) -> dict[str, dict[str, Line]]:
    """Return by job and name what there is to draw; what made no picture is left out.

    Raises:
        InvalidOptionError: no budget was run.
    """
    if not data.get("cells"):
        needed = "results of docs/benchmarks/simulated_cards.py with budgets"
        raise refuse("drawing the measured ladder", "a file without cells", needed, "run it without --caps")
    jobs: dict[str, dict[float, Row]] = {job: {} for job in TITLES}
    for key in data["cells"]:
        job, _, budget = key.partition(" ")
        jobs.setdefault(job, {})[float(budget)] = whole(data["cells"], key)
    return {
        job: _read_job(dict(sorted(cells.items())), data["rivals"].get(job, {}), data["context_bytes"])
        for job, cells in jobs.items()
        if cells
    }


def _read_job(cells: dict[float, Row], rivals: dict[str, Row], context_bytes: int) -> dict[str, Line]:
    peers = dict.fromkeys(name for cell in cells.values() for name in cell["peers"])
    lines = {name: _with_caps(name, row, cells, context_bytes) for name, row in rivals.items() if name not in peers}
    for name in peers:
        lines[name] = _under_caps({size: cell["peers"][name] for size, cell in cells.items() if name in cell["peers"]})
    lines[OURS] = _under_caps({size: cell["ours"] for size, cell in cells.items()})
    return {name: line for name, line in lines.items() if line.points}


def _with_caps(name: str, row: Row, cells: dict[float, Row], context_bytes: int) -> Line:
    """Read a way that takes what it takes: once uncapped, and where it ran out of memory under a cap all the same."""
    start = (row.get("peak_allocated_bytes", 0) + context_bytes) / GB
    ran = {size: cell["failed_rivals"].get(name, {}) for size, cell in cells.items() if "same_as" not in cell}
    return Line(
        points=[(start, row["median_s"])] if has_pictures(row) else [],
        everywhere=True,
        lossy={start} if name.endswith(TILES) else set(),
        lost=[size for size, failed in ran.items() if "out_of_memory" in failed],
    )


def _under_caps(rows: dict[float, Row]) -> Line:
    """Read a way that goes by the budget."""
    return Line(
        points=[(size, row["median_s"]) for size, row in rows.items() if has_pictures(row)],
        lossy={size for size, row in rows.items() if has_pictures(row) and not row.get("exact", True)},
        lost=[size for size, row in rows.items() if "out_of_memory" in row],
    )


def spares_nothing(name: str, lines: dict[str, Line]) -> bool:
    """Whether a way with lossy tiles takes as much memory as it does without them."""
    plain = lines.get(name.removesuffix(TILES))
    return name.endswith(TILES) and plain is not None and plain.points[0][0] <= lines[name].points[0][0]


def draw(data: Row) -> Any:
    """Draw a panel for each job."""
    jobs = read_lines(data)
    sizes = sorted({float(key.rpartition(" ")[2]) for key in data["cells"]})
    figure = new_figure(2.4 + 3.5 * len(jobs), 4.4)
    panels = figure.subplots(1, len(jobs), sharex=True, sharey=True, squeeze=False)[0]
    entries: dict[str, Any] = {}
    for axes, (job, lines) in zip(panels, jobs.items(), strict=True):
        # ours first in the legend; it lies above the others all the same
        for name in sorted(lines, key=lambda name: name != OURS):
            if not spares_nothing(name, lines):
                place = name.removesuffix(TILES)
                entries.setdefault(NAMES.get(place, place), _draw_line(axes, place, lines[name], sizes[-1]))
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(sizes, [f"{size:g}" for size in sizes], fontsize=9)
        axes.minorticks_off()
        axes.set_xlabel("memory of the card (GB)")
        axes.grid(visible=True, alpha=0.25)
        quiet_frame(axes)
        add_titles(axes, TITLES.get(job, job))
    low, high = panels[0].get_ylim()
    ticks = [tick for tick in SECONDS if low <= tick <= high]
    panels[0].set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    panels[0].set_ylabel("seconds a picture")
    hollow = any(line.lossy and not line.everywhere for lines in jobs.values() for line in lines.values())
    add_legend(panels[-1], entries | _marks(panels[-1], hollow))
    add_notes(figure, _notes(data, jobs))
    return figure


def _draw_line(axes: Any, place: str, line: Line, most: float) -> Any:
    colour, width, above = COLOURS.get(place, GREY), *((2.6, 4) if place == OURS else (1.5, 2))
    shown = dict(line.points)
    if line.everywhere:
        (start, seconds), *_ = line.points
        style = {"marker": "|", "markevery": [0], "markersize": 10, "linestyle": "--" if line.lossy else "-"}
        drawn = axes.plot([start, most], [seconds] * 2, color=colour, linewidth=width, **style)[0]
    else:
        sizes = sorted({*shown, *line.lost})
        heights = [shown.get(size, float("nan")) for size in sizes]
        drawn = axes.plot(sizes, heights, color=colour, linewidth=width, marker="o", ms=2.4 * width, zorder=above)[0]
        inside = {"s": 30, "facecolors": "white", "edgecolors": colour, "zorder": above + 1}
        axes.scatter([*line.lossy], [shown[size] for size in line.lossy], **inside)
    axes.scatter(
        line.lost, list(map(line.height, line.lost)), marker="x", s=44, linewidths=2, color=colour, zorder=above + 1
    )
    return drawn


def _marks(axes: Any, hollow: bool) -> dict[str, Any]:
    """Return what the marks mean, whatever their colour."""
    tiles = {"color": GREY, "linewidth": 1.5, "linestyle": "--", "marker": "o" if hollow else "", "mfc": "white"}
    return {
        "with lossy tiles": axes.plot([], [], **tiles)[0],
        "ran out of memory": axes.scatter([], [], marker="x", s=44, linewidths=2, color=GREY),
    }


def _notes(data: Row, jobs: dict[str, dict[str, Line]]) -> list[str]:
    device = data["environment"].get("device_name", "a GPU")
    context = data["context_bytes"] / GB
    notes = [
        f"{device}, smaller cards simulated by a cap on the allocator; {context:.2f} GB of each are the CUDA context. "
        "A way by hand is drawn at its uncapped time, from the smallest card on that holds its uncapped peak. "
        "Lossy tiles are drawn where they spare memory."
    ]
    for job, lines in jobs.items():
        missing = [name for name in data["rivals"].get(job, {}) if name not in lines and not name.endswith(TILES)]
        notes += [f"No picture of {TITLES.get(job, job)}: {', '.join(missing)}."] if missing else []
    again = [
        f"{TITLES.get(job, job)}, on {size} GB"
        for job, _, size in (key.partition(" ") for key, cell in data["cells"].items() if _fell_back(cell))
    ]
    notes += [f"After running out of memory {OURS} went on, in the time drawn: {'; '.join(again)}."] if again else []
    return notes


def _fell_back(cell: Row) -> bool:
    return bool(cell.get("ours", {}).get("fallbacks"))


def main(path: Path, picture: Path) -> None:
    """Read the results and draw."""
    data = json.loads(path.read_text())
    save_figure(lambda: draw(data), picture)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
