"""The file: one `.pt2` of AOTInductor with compiled code and a card, and no weights.

The weights are those of the module that the code is loaded for, read where they lie. Left to itself, Inductor
packages them, writes vectors of up to eight elements out as numbers (a UNet's `conv_out.bias`), and may fold what it
computes from uniform ones. `SETTINGS` closes all three (docs/decisions/ahead-of-time.md).
"""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import NotSupportedError, explain_failure, in_one_line
from ..trusted import read_trusted
from .card import Card

SUFFIX = ".pt2"

KEY = "diffusers_turbo"
"""Name of the card in the package's metadata."""

MODEL = "model"
"""torch's name of the only model in a package."""

PREFIX = "unet."
"""What stands before the names of the UNet's weights: the exported module holds it under this name."""

SETTINGS: dict[str, Any] = {
    "aot_inductor.package_constants_in_so": False,
    "aot_inductor.use_runtime_constant_folding": False,
    "always_keep_tensor_constants": True,
    "joint_graph_constant_folding": False,
    "freezing": False,
}
"""Inductor's settings that keep values of weights out of the code."""


@dataclass(frozen=True)
class Package:
    """The bytes of a package that may be trusted, and its card."""

    card: Card
    data: bytes

    def load(self, device: torch.device) -> Runner:
        """Load the code into this process, for weights on `device`."""
        index = -1 if device.index is None else device.index
        # The loader itself, since torch._inductor.aoti_load_package asks for the CPU's instruction sets by compiling
        # test programs; `machine` has compared them. And the bytes that were looked at: a path may lead elsewhere now.
        with tempfile.NamedTemporaryFile(suffix=SUFFIX) as file:
            file.write(self.data)
            file.flush()
            return Runner(torch._C._aoti.AOTIModelPackageLoader(file.name, MODEL, True, 1, index))


_LOADING = f"""
import sys, torch
if sys.argv[2] != "cpu":
    torch.accelerator.synchronize()
torch._C._aoti.AOTIModelPackageLoader(sys.argv[1], "{MODEL}", True, 1, -1)
"""


def crash_when_loaded(path: Path, device: torch.device) -> str | None:
    """Load the code in a process of its own and return the signal it died of, None if it did not.

    Code whose C++ compiler does not go together with torch's own library crashes when it is loaded, and would take
    this process along. Errors are for the loading itself to raise.
    """
    done = subprocess.run([sys.executable, "-c", _LOADING, str(path), device.type], capture_output=True, check=False)
    return signal.Signals(-done.returncode).name if done.returncode < 0 else None


class Runner:
    """Loaded code, bound to weights that somebody else owns."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def bind(self, tensors: Mapping[str, Tensor]) -> None:
        """Let the code read these tensors, by the UNet's names, where they lie.

        The code does not keep them alive: whoever calls `run` has to.
        """
        names = self.loader.get_constant_fqns()
        borrowed = {name: _borrowed(tensors[name.removeprefix(PREFIX)]) for name in names}
        # use_inactive, check_full_update, user_managed
        self.loader.load_constants(borrowed, False, True, True)

    def run(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """Compute the sample `[B, C, H, W]`."""
        output: Tensor = self.loader.run(list(inputs))[0]
        return output


def _borrowed(tensor: Tensor) -> Tensor:
    """Return a tensor on the same memory that does not own it.

    torch 2.11 to 2.13 never gives back the handles of `user_managed` constants (aoti_runtime/utils.h,
    MaybeOwningAtenTensorHandle); were they owners, no bound weight could ever be freed.
    """
    storage = tensor.untyped_storage()
    lent = torch._C._construct_storage_from_data_pointer(storage.data_ptr(), tensor.device, storage.nbytes())
    empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return empty.set_(lent, tensor.storage_offset(), tensor.shape, tensor.stride())


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Give a path to write a package to; it takes the place of `path` when the block ends well, and is gone if not."""
    with tempfile.TemporaryDirectory(prefix=".export-", dir=path.parent) as folder:
        draft = Path(folder) / path.name
        yield draft
        os.replace(draft, path)


def write_package(program: Any, card: Card, path: Path) -> None:
    """Compile an exported program with AOTInductor and write it with its card."""
    metadata = {"aot_inductor.metadata": {KEY: card.to_json()}}
    with warnings.catch_warnings():
        # torch's own deprecations while it compiles
        warnings.simplefilter("ignore")
        torch._inductor.aoti_compile_and_package(
            program, package_path=str(path), inductor_configs={**SETTINGS, **metadata}
        )
    # what others could write to would not be loaded, whatever the umask
    path.chmod(0o644)


def read_package(path: Path, tried: str) -> Package:
    """Read a package without running anything of it.

    Raises:
        NotSupportedError: no such file, not to be trusted, broken, or not one of `export_unet`.
    """
    needed, do = "a file that export_unet(path) of this version wrote", "export the UNet anew"
    try:
        data = read_trusted(path)
        card = _card_in(data)
    except OSError as error:
        found = f"{path}: {error.strerror or error}"
        raise NotSupportedError(explain_failure(tried, found, needed, "name a file that is there")) from error
    except (zipfile.BadZipFile, ValueError, TypeError, KeyError) as error:
        found = f"{path}, which is truncated or no such file ({in_one_line(error, 200)})"
        raise NotSupportedError(explain_failure(tried, found, needed, do)) from error
    return Package(card, data)


def _card_in(data: bytes) -> Card:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        if (broken := archive.testzip()) is not None:
            raise ValueError(f"{broken} is damaged")
        names = [name for name in archive.namelist() if name.endswith("_metadata.json")]
        tables = [json.loads(archive.read(name)) for name in names]
    return Card.from_json(next((table[KEY] for table in tables if KEY in table), "{}"))
