"""What the compiler made goes to disk and comes back in another process: the first call's code, and what else there is.

The code of a module's first call is a file of its own, traced and compiled (`compilation.kept_call`). All other calls
go the ordinary way, and for them there are torch's artifacts, read before the first of these calls and written at the
end of a pipeline's call that made any. torch keeps one list of artifacts a process, so a file also holds what else was
compiled in the process that wrote it. Reading one fills torch's own cache folder ($TORCHINDUCTOR_CACHE_DIR); torch then
decides by its own keys, which cover graph, code, versions and device, what of it fits. Ours only decides which file is
read.
"""

from __future__ import annotations

import importlib.metadata
import logging
import platform
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..compilation.cache import Part, default_folder, file_of, hash_of, joined, mark_used, read_parts, write_parts
from ..compilation.call import WatchedCall
from ..compilation.counts import Counts
from ..compilation.kept_call import KeptCall
from ..errors import NotSupportedError, in_one_line
from ..planning.options import CompileTransformer, CompileUNet, CompileVAE
from ..planning.units import MIB
from ..trusted import private_folder

logger = logging.getLogger("diffusers_turbo")

_present: defaultdict[str, set[str]] = defaultdict(set)
"""Of each cache folder of torch's that this process used: the names of the artifacts it put or found there."""

CompileOptions = CompileUNet | CompileTransformer | CompileVAE


@dataclass
class ShelfOnDisk:
    """Where the code of one module's calls lies: a file for each signature."""

    disk: KeptOnDisk
    module: nn.Module

    def read(self, signature: str) -> list[bytes]:
        """Return the variants of a call's code, the newest first; none where the file is not to be trusted."""
        file, key = self._place(signature)
        try:
            parts = read_parts(file, key) if file else []
        except FileNotFoundError:
            return []
        except (NotSupportedError, OSError) as error:
            logger.warning("%s: a call's code is made anew: %s", self.disk.options.action, in_one_line(error))
            return []
        if file:
            mark_used(file)
        return [part.data for part in parts]

    def write(self, signature: str, name: str, data: bytes) -> None:
        """Put a variant there; the oldest of too many goes."""
        file, key = self._place(signature)
        if file:
            self.disk.add(file, key, Part(data=data, artifacts=frozenset({name})))

    def _place(self, signature: str) -> tuple[Path | None, dict[str, Any]]:
        name = next(name for name, module in self.disk.root.named_modules() if module is self.module)
        key = {**self.disk.key, "call of": name, "signature": hash_of(signature), "settings": hash_of(_settings())}
        return (None if self.disk.folder is None else file_of(self.disk.folder, key)), key


@dataclass
class KeptOnDisk:
    """Call scope of one compiled component: has its calls' code read from disk, and written where it was compiled."""

    root: nn.Module
    options: CompileOptions
    modules: list[Any] = field(default_factory=list)
    folder: Path | None = None
    loaded: str | None = None
    written: str | None = None
    refused: str | None = None
    key: dict[str, Any] = field(default_factory=dict)
    _loaded_key: dict[str, Any] | None = None
    _saved_misses: int = 0

    @contextmanager
    def around_call(self, pipe: Any) -> Iterator[None]:
        """Let the component's calls read before they compile, and write what they made."""
        if self.refused is None and (key := key_of(self.root, self.options)) != self.key:
            self.key = key
            self._open_folder()
        for call in self._calls:
            call.before_compiling = self.load
            if call.kept is None and self._keeps_calls:
                call.kept = KeptCall(call.module, ShelfOnDisk(self, call.module), mode=self.options.mode)
            if call.kept is not None:
                call.kept.look_again()
        yield
        if self.refused is None and self._counts.misses > self._saved_misses:
            self._save()

    def revert(self) -> None:
        """Nothing: what lies on disk stays for the next time."""

    def tell(self) -> list[str]:
        """Say what was read and written, and how much of it was of use."""
        hits, misses = self._counts.hits, self._counts.misses
        graphs = [f"{hits} graphs found in torch's cache, {misses} made anew"] if hits or misses else []
        calls = [text for call in self._calls if call.kept is not None for text in call.kept.tell()]
        parts = [text for text in (*calls, self.loaded, *graphs, self.written, self.refused) if text]
        return [f"persistent cache: {'; '.join(parts)}"] if parts else []

    def __getstate__(self) -> dict[str, Any]:
        """Leave behind what was read and written by this object."""
        fresh = KeptOnDisk(self.root, self.options, self.modules)
        return vars(fresh)

    @property
    def _calls(self) -> list[WatchedCall]:
        return [call for module in self.modules if (call := module.compiled) is not None]

    @property
    def _keeps_calls(self) -> bool:
        """Whether a first call's code is kept: not that of many small modules, nor code for all sizes."""
        return self.refused is None and not self.options.regional and self.options.dynamic is not True

    @property
    def _counts(self) -> Counts:
        return sum((call.counts for call in self._calls), Counts())

    def _open_folder(self) -> None:
        named = self.options.cache_dir
        try:
            self.folder = private_folder(Path(named).expanduser() if isinstance(named, str) else default_folder())
        except NotSupportedError as error:
            self.folder = None
            self._refuse(f"not used: {error}")

    def load(self) -> None:
        """Bring torch's artifacts back, once a key."""
        if self.folder is None or self.key == self._loaded_key:
            return
        self._loaded_key, self.loaded = self.key, None
        file = file_of(self.folder, self.key)
        try:
            parts, present = read_parts(file, self.key), _present[_torchs_folder()]
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
        if saved is None or self.folder is None:
            return
        data, info = saved
        names = frozenset(f"{kind}:{name}" for kind, found in info.artifacts.items() for name in found)
        _present[_torchs_folder()] |= names
        self.add(file_of(self.folder, self.key), self.key, Part(data=data, artifacts=names))

    def add(self, file: Path, key: dict[str, Any], part: Part) -> None:
        """Write a part into a key's file beside what is there, or say why not and use the cache no more."""
        try:
            old = read_parts(file, key)
        except (NotSupportedError, OSError):
            old = []
        try:
            size = write_parts(file, key, joined(old, part))
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


def _settings() -> list[dict[str, Any]]:
    """Return the compiler's settings, as far as torch has them in the keys of its own cache."""
    from torch._functorch import config as functorch
    from torch._inductor import config as inductor

    return [inductor.save_config_portable(), functorch.save_config_portable()]


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
