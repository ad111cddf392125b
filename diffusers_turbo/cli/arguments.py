"""Options that several commands share, and what their text means."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated

import typer

from ..bench.cases import LOADING_DTYPES
from ..bench.job import ARCHITECTURE
from ..bench.loading import default_device
from ..bench.model_configs import ARCHITECTURES
from ..bench.reading import refuse
from ..bench.schedulers import SCHEDULERS
from ..planning.options import dtype_name

Model = Annotated[str | None, typer.Option("--model", help="Folder of a diffusers model, or its id on the Hub.")]
Arch = Annotated[
    str | None,
    typer.Option("--arch", help=f"Full-size architecture with random weights: {', '.join(ARCHITECTURES)}."),
]
Size = Annotated[str | None, typer.Option("--size", help="Pixels: 512, or WIDTHxHEIGHT. Default: the model's own.")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1, mps. Default: what is there.")]
Dtype = Annotated[
    str | None, typer.Option("--dtype", help="What weights are loaded in. Default: float16 on CUDA, else float32.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on standard output.")]
Scheduler = Annotated[str | None, typer.Option("--scheduler", help=f"{', '.join(SCHEDULERS)}.")]
Vram = Annotated[
    str | None, typer.Option("--vram", help='Memory to stay within, such as "6GB". Default: what is free.')
]
Tier = Annotated[str | None, typer.Option(help="instant, compiled, fastest or none. Default: fastest, where measured.")]
CacheDir = Annotated[
    str | None, typer.Option(help="Folder for what is compiled, where the next process finds it. Default: none.")
]
Exact = Annotated[bool, typer.Option("--exact", help="Allow exact steps only.")]
ExtraCases = Annotated[str | None, typer.Option("--cases", help="TOML file with configurations of your own.")]

LISTS = ("--batch", "--configs", "--tokens", "--backends", "--prompt")
"""Options that take several values after one name: `--batch 1 2 4`."""


def spread_lists(arguments: Sequence[str]) -> list[str]:
    """Repeat the name of a list option before each of its values, which is how the parser knows lists.

    >>> spread_lists(["--batch", "1", "2", "--steps", "4"])
    ['--batch', '1', '--batch', '2', '--steps', '4']
    """
    spread: list[str] = []
    inside: str | None = None
    for argument in arguments:
        if argument.startswith("--"):
            inside = argument if argument in LISTS else None
            spread += [] if inside else [argument]
        else:
            spread += [inside, argument] if inside else [argument]
    return spread


def model_name(model: str | None, arch: str | None, command: str) -> str:
    """Return the one model that was named.

    Raises:
        InvalidOptionError: none was, or two.
    """
    if (model is None) == (arch is None):
        found = "neither --model nor --arch" if model is None else "both --model and --arch"
        raise refuse(command, found, "one of the two", "name a model, such as --arch sd15")
    return model if model is not None else f"{ARCHITECTURE}{arch}"


def height_and_width(size: str | None) -> tuple[int | None, int | None]:
    """Return height and width of "512" or "768x512" (width first, as screens are named).

    Raises:
        InvalidOptionError: neither form.
    """
    if size is None:
        return None, None
    found = re.fullmatch(r"([1-9]\d{0,5})(?:x([1-9]\d{0,5}))?", size.strip().lower())
    if found is None:
        raise refuse(f"--size {size}", repr(size), "pixels such as 512 or 768x512", "correct it, or leave it out")
    width = int(found[1])
    return int(found[2] or width), width


def device_and_dtype(device: str | None, dtype: str | None) -> tuple[str, str]:
    """Fill in the device there is and the dtype that suits it.

    Raises:
        InvalidOptionError: no such dtype.
    """
    chosen = device or default_device()
    name = dtype_name(dtype or ("float16" if chosen.startswith("cuda") else "float32"))
    if name not in LOADING_DTYPES:
        raise refuse(f"--dtype {dtype}", f"{dtype!r}", "float32, float16 or bfloat16", "correct it, or leave it out")
    return chosen, name


def split_names(names: Sequence[str]) -> list[str]:
    """Split `a,b` and `a b` alike.

    >>> split_names(["stock,sdpa", "half"])
    ['stock', 'sdpa', 'half']
    """
    return [name.strip() for given in names for name in given.split(",") if name.strip()]
