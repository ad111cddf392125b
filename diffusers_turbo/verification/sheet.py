"""Pictures under each other on one PNG: the reference, what was checked, and their difference, amplified."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..errors import InvalidOptionError, explain_failure
from .check import Verification

SHOWN = 8
"""Pairs on a sheet."""

MARGIN, LABEL = 6, 20

_FACTORS = tuple(first * 10.0**power for power in range(8) for first in (1, 2, 5))


def save_verification(found: Verification, path: Path) -> None:
    """Write reference, pictures and amplified difference of the first pairs to a PNG.

    Raises:
        InvalidOptionError: the file cannot be written.
    """
    ours, reference = (pictures[:SHOWN] for pictures in found.made)
    factor, difference = amplified(ours, reference)
    rows = {
        f"reference: {found.reference}": reference,
        f"{found.pipeline}, {found.dtype}: {found.verdict.level}, {found.ours.psnr_db:.1f} dB": ours,
        f"difference x {factor:g}": difference,
    }
    save_rows(rows, path)


def amplified(ours: Tensor, reference: Tensor) -> tuple[float, Tensor]:
    """Return a factor that makes the larger differences visible, and the difference `[P, 3, H, W]` times it."""
    difference = (ours.float() - reference.float()).abs().nan_to_num(nan=1.0)
    # all but the largest two in a thousand, which may saturate
    level = float(np.quantile(difference.numpy(), 0.998))
    factor = max((step for step in _FACTORS if step * level <= 1), default=1.0) if level > 0 else 1.0
    return factor, difference * factor


def save_rows(rows: Mapping[str, Tensor], path: Path, columns: Sequence[str] = ()) -> None:
    """Write rows of pictures `[P, 3, H, W]` in [0, 1] to a PNG, each under its name.

    Args:
        rows: the pictures by the row's name.
        path: where to write; missing folders are made.
        columns: what to write under the columns.

    Raises:
        InvalidOptionError: the file cannot be written.
    """
    font = ImageFont.load_default(size=13)
    first = next(iter(rows.values()))
    count, height, width = first.shape[0], first.shape[2], first.shape[3]
    names_width = max(int(font.getlength(name)) for name in rows) + 2 * MARGIN
    sheet_width = max(count * (width + MARGIN) + MARGIN, names_width)
    sheet_height = len(rows) * (height + LABEL + MARGIN) + MARGIN + (LABEL if columns else 0)
    sheet = Image.new("RGB", (sheet_width, sheet_height), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (name, pictures) in enumerate(rows.items()):
        top = MARGIN + row * (height + LABEL + MARGIN)
        pen.text((MARGIN, top), name, fill="black", font=font)
        for column, picture in enumerate(pictures):
            pixels = (picture.float().nan_to_num(nan=0.0).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
            sheet.paste(Image.fromarray(pixels), (MARGIN + column * (width + MARGIN), top + LABEL))
    for column, text in enumerate(columns):
        pen.text((MARGIN + column * (width + MARGIN), sheet_height - LABEL), text, fill="black", font=font)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path)
    except OSError as error:
        found = f"{type(error).__name__}: {error.strerror or error}"
        raise InvalidOptionError(
            explain_failure(f"writing {path}", found, "a folder that can be written to", "choose another file")
        ) from error
