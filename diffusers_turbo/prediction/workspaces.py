"""What cuDNN and cuBLAS need beside the tensors: a fitted model, a row for each SM level, in `workspaces.toml`."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..planning.units import MIB
from .recording import Convolved

TABLE = Path(__file__).with_name("workspaces.toml")


@dataclass(frozen=True, kw_only=True)
class Workspaces:
    """Workspaces of one SM level.

    Attributes:
        sm: the level; the row of the level itself, or of the one that stands in for it.
        measured: whether peaks were measured on this level.
        margin: share of a peak to keep beyond the prediction.
        cublas_bytes: cuBLAS's workspace, taken at the first product of a stream and kept.
        other_bytes: what else is allocated from then on and was found by the fit.
        nchw_copies: of a convolution in NCHW: how many copies of its input and of its output cuDNN holds.
        nhwc_copies: the same in channels-last.
        source: where the numbers are from.
    """

    sm: tuple[int, int]
    measured: bool
    margin: float
    cublas_bytes: int
    other_bytes: int
    nchw_copies: tuple[float, float]
    nhwc_copies: tuple[float, float]
    source: str

    def convolution_bytes(self, call: Convolved) -> int:
        """Return what one convolution takes beside its input, weight and output, while it runs."""
        of_input, of_output = self.nhwc_copies if call.channels_last else self.nchw_copies
        workspace = of_input * call.input + of_output * call.output
        # weights are laid out anew along with the input
        workspace += 0 if call.channels_last else call.weight
        return int(workspace) + (call.input if call.copies_input else 0)


@cache
def _table() -> dict[str, Any]:
    return tomllib.loads(TABLE.read_text(encoding="utf-8"))


def workspaces_of(sm: tuple[int, int] | None) -> Workspaces:
    """Return the model of an SM level: its own row, else the one of the measured level with its own cuBLAS.

    >>> workspaces_of((9, 0)).measured, workspaces_of((8, 6)).measured
    (True, False)
    """
    table = _table()
    rows = {tuple(row["sm"]): row for row in table["level"]}
    row = rows.get(sm) if sm is not None else None
    measured = row is not None
    row = row or rows[tuple(table["stand_in"])]
    cublas = table["cublas"]
    large = sm is not None and sm[0] in cublas["large_majors"]
    return Workspaces(
        sm=tuple(row["sm"]),
        measured=measured,
        margin=row["margin"] if measured else table["margin_unmeasured"],
        cublas_bytes=int(cublas["large_bytes"] if large else cublas["small_bytes"]),
        other_bytes=int(row["other_mib"] * MIB),
        nchw_copies=tuple(row["nchw_copies"]),
        nhwc_copies=tuple(row["nhwc_copies"]),
        source=row["source"],
    )
