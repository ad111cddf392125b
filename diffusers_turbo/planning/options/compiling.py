"""What hands a component to a compiler: torch.compile, torch.jit.trace and AOTInductor."""

from __future__ import annotations

import os
from dataclasses import dataclass

from ..base import Options

COMPILE_MODES = (None, "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


@dataclass(frozen=True, kw_only=True)
class _Compile(Options):
    """`cache_dir` is the folder to keep compiled code in; True means the user's cache folder, None and False none."""

    slot = "compile"

    mode: str | None = None
    fullgraph: bool = False
    dynamic: bool | None = None
    regional: bool = False
    backend: str = "inductor"
    cache_dir: bool | str | None = None

    def __post_init__(self) -> None:
        self._check_choice("mode", COMPILE_MODES)
        self._check_choice("dynamic", (None, True, False))
        self._check_flags("fullgraph", "regional")
        if not isinstance(self.backend, str) or not self.backend:
            raise self._refuse("backend", "the name of a torch.compile backend", 'use "inductor"')
        if self.mode not in (None, "default") and self.backend != "inductor":
            # the other backends of torch take no mode and fail only at the first call, minutes later
            raise self._refuse("mode", 'backend="inductor"', "leave mode out, or leave backend at its default")
        self._check_cache_dir()

    def _check_cache_dir(self) -> None:
        if isinstance(self.cache_dir, os.PathLike):
            object.__setattr__(self, "cache_dir", os.fspath(self.cache_dir))
        if self.cache_dir is not None and not (isinstance(self.cache_dir, (bool, str)) and self.cache_dir != ""):
            raise self._refuse("cache_dir", "True, False, None or a folder", "use True for the user's cache folder")
        if self.cache_dir and self.backend != "inductor":
            raise self._refuse("cache_dir", 'backend="inductor", which alone makes code to keep', "leave cache_dir out")


@dataclass(frozen=True, kw_only=True)
class CompileUNet(_Compile):
    """Compile the UNet in place with torch.compile."""

    action = "compile_unet"


@dataclass(frozen=True, kw_only=True)
class CompileTransformer(_Compile):
    """Compile the transformer in place with torch.compile."""

    action = "compile_transformer"


@dataclass(frozen=True, kw_only=True)
class CompileVAE(_Compile):
    """Compile the VAE's decoder in place with torch.compile."""

    action = "compile_vae"


@dataclass(frozen=True, kw_only=True)
class TraceUNet(Options):
    """Run the UNet through torch.jit.trace.

    `height`, `width` (pixels) and `batch_size` are those of the traced example; `check` compares at a size and batch
    that were not traced; `save_path` writes the trace, `load_path` reads one instead of tracing.
    """

    action = "trace_unet"
    slot = "trace"

    height: int | None = None
    width: int | None = None
    batch_size: int = 1
    check: bool = True
    save_path: str | None = None
    load_path: str | None = None

    def __post_init__(self) -> None:
        self._check_positive("height", multiple_of=8)
        self._check_positive("width", multiple_of=8)
        self._check_positive("batch_size")
        self._check_flags("check")
        if self.save_path is not None and self.load_path is not None:
            raise self._refuse("load_path", "save_path or load_path, not both", "leave one of the two out")


@dataclass(frozen=True, kw_only=True)
class LoadExportedUNet(Options):
    """Run the UNet as code that `export_unet(path)` compiled ahead of time; None names no file and loads nothing."""

    action = "load_exported_unet"
    slot = "exported"

    path: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.path, os.PathLike):
            object.__setattr__(self, "path", os.fspath(self.path))
        if self.path is not None and not (isinstance(self.path, str) and self.path.endswith(".pt2")):
            raise self._refuse("path", "the path of a .pt2 file", "name what export_unet(path) wrote")
