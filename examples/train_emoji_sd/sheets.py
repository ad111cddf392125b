"""Contact sheets: many small pictures on one page."""

from __future__ import annotations

import textwrap

from config import IMAGE_SIZE
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

COLUMNS = 8
MARGIN = 8  # pixels
LINE = 13  # pixels, one line of text under a picture


def to_pictures(images: Tensor) -> list[Image.Image]:
    """Images `[N, 3, H, W]` in 0..1 -> pictures."""
    pixels = (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(p) for p in pixels]


def contact_sheet(images: Tensor, prompts: list[str]) -> Image.Image:
    """Eight pictures a row, each with its prompt under it in up to three lines."""
    width, height = IMAGE_SIZE + 2 * MARGIN, IMAGE_SIZE + 3 * LINE + MARGIN
    rows = -(-len(prompts) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * width, rows * height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    for i, (picture, prompt) in enumerate(zip(to_pictures(images), prompts, strict=True)):
        x, y = (i % COLUMNS) * width + MARGIN, (i // COLUMNS) * height
        sheet.paste(picture, (x, y))
        text = "\n".join(textwrap.wrap(prompt, 22)[:3])
        draw.multiline_text((x + IMAGE_SIZE // 2, y + IMAGE_SIZE), text, "black", font, anchor="ma", align="center")
    return sheet


def pair_sheet(originals: Tensor, copies: Tensor) -> Image.Image:
    """Originals `[N, 3, H, W]` with their copies right below, eight pairs a row."""
    size = originals.shape[-1]
    rows = -(-len(originals) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * size, 2 * rows * size), "white")
    for i, pair in enumerate(zip(to_pictures(originals), to_pictures(copies), strict=True)):
        for below, picture in enumerate(pair):
            sheet.paste(picture, ((i % COLUMNS) * size, (2 * (i // COLUMNS) + below) * size))
    return sheet
