"""Read the data set that build_dataset.py wrote, and turn it into tensors that live on the training device."""

from __future__ import annotations

import io
import json
import random
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from config import CAPTION_VARIANTS, MAX_TOKENS, STYLES, caption
from PIL import Image
from torch import Tensor
from transformers import CLIPTokenizer


@dataclass(frozen=True, kw_only=True)
class Item:
    """One training image: which thing (`label`), drawn how (`style`)."""

    hexcode: str
    style: str
    label: str
    tags: tuple[str, ...]

    @property
    def prompt(self) -> str:
        return caption(self.style, self.label)


def load_items(folder: Path) -> list[Item]:
    """Every image's description, in a fixed order: concept by concept, the styles in the order of `STYLES`."""
    with open(folder / "captions.jsonl") as lines:
        concepts = [json.loads(line) for line in lines]
    return [
        Item(hexcode=c["hexcode"], style=style, label=c["label"], tags=tuple(c["tags"]))
        for c in concepts
        for style in STYLES
    ]


def load_images(folder: Path, items: list[Item]) -> Tensor:
    """uint8 pixels `[N, 3, 128, 128]` of the items, on the CPU."""
    with zipfile.ZipFile(folder / "emoji.zip") as archive:
        pictures = [Image.open(io.BytesIO(archive.read(f"{i.style}/{i.hexcode}.webp"))).convert("RGB") for i in items]
    return torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2).contiguous()


def to_signed(pixels: Tensor) -> Tensor:
    """uint8 `[...]` in 0..255 -> float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def caption_variants(item: Item, rng: random.Random) -> list[str]:
    """`CAPTION_VARIANTS` ways to ask for the item; mostly the plain sentence, since that is what users type."""

    def some_tags() -> list[str]:
        return rng.sample(item.tags, min(len(item.tags), rng.randint(1, 3)))

    tagged = [caption(item.style, item.label, some_tags()) for _ in range(2)]
    plain = [item.prompt] * (CAPTION_VARIANTS - len(tagged) - 1)
    return [*plain, *tagged, item.label]


def tokenize(tokenizer: CLIPTokenizer, prompts: list[str]) -> Tensor:
    """Token ids `[len(prompts), 77]`, padded as StableDiffusionPipeline pads them."""
    return tokenizer(
        prompts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids


def caption_table(tokenizer: CLIPTokenizer, items: list[Item], seed: int = 0) -> Tensor:
    """Token ids `[N + 1, CAPTION_VARIANTS, 77]`; the last row is the empty caption."""
    rng = random.Random(seed)
    prompts = [text for item in items for text in caption_variants(item, rng)] + [""] * CAPTION_VARIANTS
    return tokenize(tokenizer, prompts).view(len(items) + 1, CAPTION_VARIANTS, MAX_TOKENS)
