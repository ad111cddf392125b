"""What the compiler made goes to disk at the end of the calls that made it, and comes back in another process.

torch keeps one list of artifacts a process, so a file also holds what else was compiled in the process that wrote it.
Reading one fills torch's own cache folder ($TORCHINDUCTOR_CACHE_DIR); torch then decides by its own keys, which cover
graph, code, versions and device, what of it fits. Ours only decides which file is read.
"""

from __future__ import annotations

import importlib.metadata
import logging
import platform
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..compilation.cache import Part, default_folder, file_of, hash_of, joined, mark_used, read_parts, write_parts
from ..compilation.counts import Counts
from ..errors import NotSupportedError, in_one_line
from ..planning.options import CompileTransformer, CompileUNet, CompileVAE
from ..planning.units import MIB
from ..trusted import private_folder

logger = logging.getLogger("diffusers_turbo")

_present: defaultdict[str, set[str]] = defaultdict(set)
"""Of each cache folder of torch's that this process used: the names of the artifacts it put or found there."""

CompileOptions = CompileUNet | CompileTransformer | CompileVAE


@dataclass
class KeptOnDisk:
    """Call scope of one compiled component: reads its file before the first call, writes it after one that compiled."""

    root: nn.Module
    options: CompileOptions
    modules: list[Any] = field(default_factory=list)
    folder: Path | None = None
    loaded: str | None = None
    written: str | None = None
    refused: str | None = None
    _key: dict[str, Any] | None = None
    _saved_misses: int = 0

    @contextmanager
    def around_call(self, pipe: Any) -> Iterator[None]:
        """Read before, write after."""
        if self.refused is None:
            self._load()
        yield
        if self.refused is None and self._counts.misses > self._saved_misses:
            self._save()

    def revert(self) -> None:
        """Nothing: what lies on disk stays for the next time."""

    def tell(self) -> list[str]:
        """Say what was read and written, and how much of it was of use."""
        hits, misses = self._counts.hits, self._counts.misses
        graphs = [f"{hits} graphs found in torch's cache, {misses} made anew"] if hits or misses else []
        parts = [text for text in (self.loaded, *graphs, self.written, self.refused) if text]
        return [f"persistent cache: {'; '.join(parts)}"] if parts else []

    def __getstate__(self) -> dict[str, Any]:
        """Leave behind what was read and written by this object."""
        fresh = {part.name: part.default for part in fields(self) if part.name not in ("root", "options", "modules")}
        return {**vars(self), **fresh}

    @property
    def _counts(self) -> Counts:
        return sum((call.counts for module in self.modules if (call := module.compiled) is not None), Counts())

    def _load(self) -> None:
        key = key_of(self.root, self.options)
        if key == self._key:
            return
        self._key, self.loaded = key, None
        named = self.options.cache_dir
        try:
            self.folder = private_folder(Path(named).expanduser() if isinstance(named, str) else default_folder())
        except NotSupportedError as error:
            self._refuse(f"not used: {error}")
            return
        file = file_of(self.folder, key)
        try:
            parts, present = read_parts(file, key), _present[_torchs_folder()]
            # what was made in one process lies in the file of each of its components
            missing = [part for part in parts if not part.artifacts <= present]
            for part in reversed(missing):
                if torch.compiler.load_cache_artifacts(part.data) is None:
                    raise NotSupportedError(f"torch could not read the artifacts in {file}")
                present |= part.artifacts
        except FileNotFoundError:
            self.loaded = f"nothing yet in {file}"
        except Exception as error:  # whatever torch meets in its own folder: a full disk, another version's pickle
            self.loaded = f"not loaded, made anew: {in_one_line(error)}"
            logger.warning("%s: the persistent cache was %s", self.options.action, self.loaded)
        else:
            mark_used(file)
            size = _mib(sum(len(part.data) for part in missing))
            self.loaded = f"{size} loaded from {file}" if missing else f"what {file} holds is there already"

    def _save(self) -> None:
        self._saved_misses = self._counts.misses
        saved = torch.compiler.save_cache_artifacts()
        if saved is None or self.folder is None or self._key is None:
            return
        data, info = saved
        names = frozenset(f"{kind}:{name}" for kind, found in info.artifacts.items() for name in found)
        _present[_torchs_folder()] |= names
        file = file_of(self.folder, self._key)
        try:
            old = read_parts(file, self._key)
        except (NotSupportedError, OSError):
            old = []
        try:
            size = write_parts(file, self._key, joined(old, Part(data=data, artifacts=names)))
        except (NotSupportedError, OSError) as error:
            self._refuse(f"not written: {in_one_line(error)}")
        else:
            self.written = f"{_mib(size)} written to {file}"

    def _refuse(self, why: str) -> None:
        self.refused = why
        logger.warning("%s: the persistent cache is %s", self.options.action, why)


def key_of(root: nn.Module, options: CompileOptions) -> dict[str, Any]:
    """Return what a file of compiled code is good for: model, device, dtype, versions and options."""
    weight = next(root.parameters())
    config = {name: value for name, value in dict(getattr(root, "config", {})).items() if not name.startswith("_")}
    return {
        "model": type(root).__name__,
        "architecture": hash_of(config),
        "dtype": str(weight.dtype).removeprefix("torch."),
        **_device(weight.device),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        **{package: _version(package) for package in ("triton", "diffusers", "diffusers-turbo")},
        "options": {name: value for name, value in options.as_dict().items() if name != "cache_dir"},
    }


def _torchs_folder() -> str:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return cache_dir()


def _device(device: torch.device) -> dict[str, Any]:
    if device.type == "cuda":
        sm = torch.cuda.get_device_capability(device)
        return {"device": torch.cuda.get_device_name(device), "sm": f"{sm[0]}.{sm[1]}"}
    if device.type == "cpu":
        return {"device": f"{platform.machine()} CPU", "sm": torch.backends.cpu.get_cpu_capability()}
    return {"device": device.type, "sm": None}


@cache
def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # Triton on a CPU, this package run from a checkout
        return None


def _mib(size: int) -> str:
    return f"{size / MIB:.1f} MiB"
