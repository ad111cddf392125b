"""Fit the workspaces of cuDNN and cuBLAS to measured peaks, and say how well the predictions agree with them.

python docs/benchmarks/fit_workspaces.py docs/benchmarks/memory-grid-h100.json

Every row is run on the meta device once; a candidate is judged by replaying the runs. Nothing is written: the numbers
go into diffusers_turbo/prediction/workspaces.toml by hand, with their source.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from diffusers_turbo.bench.architectures import build
from diffusers_turbo.planning.options import Options, make_options
from diffusers_turbo.planning.units import MIB
from diffusers_turbo.prediction.predict import Predictor
from diffusers_turbo.prediction.workspaces import Workspaces

COPIES = (0.0, 0.5, 1.0, 1.5, 2.0)
OTHER_MIB = (0, 1, 2, 3, 4, 5, 6, 7, 8, 10)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured peak, in bytes."""

    architecture: str
    dtype: str
    side: int
    batch_size: int
    options: tuple[Options, ...]
    allocated: int

    @property
    def channels_last(self) -> bool:
        """Whether its convolutions run in channels-last."""
        return any(option.action == "enable_channels_last" for option in self.options)


def read(path: Path) -> list[Row]:
    """Read the raw data."""
    return [
        Row(
            architecture=row["architecture"],
            dtype=row["dtype"],
            side=row["side"],
            batch_size=row["batch_size"],
            options=tuple(make_options(action, **arguments) for action, arguments in row["switches"]),
            allocated=max(stage["allocated"] for stage in row["stages"].values()),
        )
        for row in json.loads(path.read_text())["rows"].values()
    ]


def errors(rows: Iterable[Row], predictors: dict[Any, Predictor], workspaces: Workspaces) -> list[tuple[float, Row]]:
    """Return predicted over measured, less one, for each row."""
    found = []
    for row in rows:
        predictor = predictors[row.architecture, row.dtype]
        predictor.workspaces = workspaces
        made = predictor(height=row.side, width=row.side, batch_size=row.batch_size, options=row.options)
        found.append((made.peak_bytes / row.allocated - 1, row))
    return found


def best(rows: Sequence[Row], predictors: dict[Any, Predictor], candidates: Iterable[Workspaces]) -> Workspaces:
    """Return the candidate with the smallest mean error, counting what is too low five times.

    The mean and not the median: rows that another stage decides say nothing of a workspace, and are most of the rows.
    """

    def badness(workspaces: Workspaces) -> float:
        return statistics.mean(-5 * error if error < 0 else error for error, _ in errors(rows, predictors, workspaces))

    return min(candidates, key=badness)


def main() -> None:
    """Fit one coefficient after the other, and print the result and each row's error."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("measurements", type=Path)
    parser.add_argument("--check", action="store_true", help="leave the table's numbers and only print the errors")
    given = parser.parse_args()
    rows = read(given.measurements)
    predictors = {
        (name, dtype): Predictor(build(name, dtype=getattr(torch, dtype), device="meta", text_encoders=True))
        for name, dtype in dict.fromkeys((row.architecture, row.dtype) for row in rows)
    }
    fitted = next(iter(predictors.values())).workspaces
    assert fitted is not None
    if not given.check:
        nchw = [row for row in rows if not row.channels_last]
        nhwc = [row for row in rows if row.channels_last]
        pairs = list(itertools.product(COPIES, COPIES))
        fitted = best(nchw, predictors, [replace(fitted, nchw_copies=pair) for pair in pairs])
        fitted = best(nhwc, predictors, [replace(fitted, nhwc_copies=pair) for pair in pairs]) if nhwc else fitted
        fitted = best(rows, predictors, [replace(fitted, other_bytes=mib * MIB) for mib in OTHER_MIB])
    print(f"nchw_copies = {list(fitted.nchw_copies)}\nnhwc_copies = {list(fitted.nhwc_copies)}")
    print(f"other_mib = {fitted.other_bytes / MIB}")
    found = errors(rows, predictors, fitted)
    for error, row in found:
        switches = ", ".join(option.action for option in row.options)
        print(f"{error:+7.2%}  {row.architecture} {row.side} x {row.batch_size} {row.dtype}: {switches}")
    sizes = [abs(error) for error, _ in found]
    print(
        f"median {statistics.median(sizes):.2%}, within 8 %: {sum(size <= 0.08 for size in sizes) / len(sizes):.0%}, "
    )
    print(f"most too low {min(error for error, _ in found):.2%}, most too high {max(error for error, _ in found):.2%}")


if __name__ == "__main__":
    main()
