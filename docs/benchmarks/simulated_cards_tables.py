"""The tables of `simulated_cards.py`: budgets, hand-made ways, caps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

GB = 2**30
RESIDENT, OURS = "resident", "auto_optimize"

Row = dict[str, Any]


def has_pictures(row: Row) -> bool:
    return "median_s" in row


def told(row: Row | None) -> str:
    """Say how long a picture took, or what came instead."""
    if not row:
        return "-"
    return f"{row['median_s']:.2f}" if has_pictures(row) else "out of memory" if "out_of_memory" in row else "failed"


def gib(row: Row, name: str) -> str:
    """Say how many GiB a row's figure is."""
    return f"{row[name] / GB:.2f}" if row.get(name) else "-"


def switches(ours: Row) -> str:
    """Name the switches for memory that a plan took."""
    names = [name.removeprefix("enable_") for name in ours.get("steps", {}) if "offload" in name or "vae_t" in name]
    return " + ".join(names) or RESIDENT


def kind(ours: Row) -> str:
    """Say whether ours draws what the model draws, and whether memory ran out on the way."""
    if not has_pictures(ours):
        return "-"
    exact = "exact" if ours["exact"] else "lossy (tiles)"
    return f"{exact}, after running out of memory" if ours["fallbacks"] else exact


def as_table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Return a Markdown table."""
    return ["| " + " | ".join(cells) + " |" for cells in (head, ("---",) * len(head), *rows)]


def share(cell: Row) -> float | None:
    """Return how long ours takes beside the rival, None where one of them made no picture."""
    rival, ours = cell["rival"] or {}, cell["ours"]
    return ours["median_s"] / rival["median_s"] if has_pictures(rival) and has_pictures(ours) else None


def whole(cells: dict[str, Row], key: str) -> Row:
    """Return a cell, with what it has in common with the one that it is the same as; other packages ran in each.

    >>> whole({"sd 4": {"ours": {}, "peers": {"mmgp": {}}}, "sd 6": {"same_as": "sd 4"}}, "sd 6")
    {'ours': {}, 'peers': {}, 'same_as': 'sd 4'}
    """
    cell = cells[key]
    return {**cells.get(cell.get("same_as", ""), {}), "peers": {}, **cell}


def budget_table(cells: dict[str, Row]) -> list[str]:
    """Return a row for each job and budget, other packages in columns of their own, and lines that count the cells."""
    peers = list(dict.fromkeys(name for cell in cells.values() for name in cell.get("peers", {})))
    head = ("job", "budget", "hand-made", "s", "ours", "picture", "s", "ours / hand-made", "GiB predicted", "measured")
    rows, shares, lost, alone = [], [], 0, 0
    for key, cell in cells.items():
        job, _, budget = key.partition(" ")
        others = tuple(told(cell.get("peers", {}).get(name)) for name in peers)
        if "same_as" in cell:
            same = f"as with {cell['same_as'].partition(' ')[2]} GB"
            rows.append((job, f"{budget} GB", same, *("",) * 7, *others))
            continue
        ours, beside = cell["ours"], share(cell)
        lost += not has_pictures(ours)
        alone += has_pictures(ours) and beside is None
        shares += [] if beside is None else [beside]
        rival = (cell["rival_name"] or "none fits", told(cell["rival"]))
        mine = (switches(ours), kind(ours), told(ours), "-" if beside is None else f"{beside:.2f}")
        memory = (gib(ours, "predicted_bytes"), gib(ours, "peak_allocated_bytes"))
        rows.append((job, f"{budget} GB", *rival, *mine, *memory, *others))
    counts = (
        f"{len(shares) + alone + lost} cells: ours ahead in {sum(found < 1 for found in shares)}, behind by up to 10 % "
        f"in {sum(1 <= found <= 1.1 for found in shares)}, by more in {sum(found > 1.1 for found in shares)}, the only "
        f"one that fits in {alone}, out of memory or failed in {lost}"
    )
    return [*as_table((*head, *peers), rows), "", counts, *(against(name, cells) for name in peers)]


def against(name: str, cells: dict[str, Row]) -> str:
    """Count the cells in which another package draws, and in which ours is ahead of it."""
    ran = [found for key in cells if name in (found := whole(cells, key))["peers"]]
    pairs = [(found["peers"][name], found["ours"]) for found in ran if has_pictures(found["peers"][name])]
    ahead = sum(has_pictures(ours) and ours["median_s"] < row["median_s"] for row, ours in pairs)
    return f"{name}: draws in {len(pairs)} of {len(ran)} cells, ours ahead of it in {ahead} of these"


def rival_table(rivals: dict[str, dict[str, Row]]) -> list[str]:
    """Return what each rival takes uncapped."""
    rows = [
        (job, way, gib(row, "peak_allocated_bytes"), gib(row, "peak_reserved_bytes"), told(row))
        for job, found in rivals.items()
        for way, row in found.items()
    ]
    return as_table(("job", "hand-made, uncapped", "GiB allocated", "reserved", "s"), rows)


def cap_table(caps: dict[str, Row]) -> list[str]:
    """Return what became of each cap."""
    rows = []
    for key, row in caps.items():
        job, cap, way = key.split(" ", 2)
        ours = (switches(row), kind(row)) if way.startswith(OURS) else ("", "")
        rows.append((job, f"{cap} GiB", way, *ours, gib(row, "whole_peak_bytes"), told(row)))
    return as_table(("job", "hard cap", "way", "switches", "picture", "GiB allocated", "s"), rows)
