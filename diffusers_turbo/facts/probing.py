"""Asking a real device: the only place that reads torch.cuda's and torch.mps's properties."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from typing import Any

from ..errors import InvalidOptionError, explain_failure
from .device import DeviceFacts, lacks_tensor_cores, missing_kernels, unusable_formats
from .host import cxx_compiler, host_memory

_PACKAGES = ("torch", "diffusers", "accelerate", "transformers", "xformers", "triton", "peft")


def probe_device(device: object = None) -> DeviceFacts:
    """Return the facts of `device`; see `diffusers_turbo.probe`."""
    import torch

    name = str(device) if device is not None else _default_device(torch)
    kind = name.partition(":")[0]
    shared: dict[str, Any] = {
        "device_type": kind,
        "cxx_compiler": cxx_compiler(),
        "versions": _versions(torch),
        "host_ram_bytes": host_memory()[1],
    }
    if kind == "cuda":
        return _probe_cuda(torch, name, shared)
    total_bytes, free_bytes = _memory_of(torch, kind)
    label = {"cpu": platform.processor() or platform.machine() or "CPU", "mps": "Apple GPU"}.get(kind, kind)
    return DeviceFacts(
        device=name,
        name=label,
        total_bytes=total_bytes,
        free_bytes=free_bytes,
        multiprocessors=torch.get_num_threads() if kind == "cpu" else 0,
        refusals=unusable_formats(kind, None, label),
        **shared,
    )


def require_device(device: Any) -> None:
    """Refuse a device that is not here.

    Raises:
        InvalidOptionError: no such device, or torch was built without it.
    """
    import torch

    tried, named = f"using {device}", '"cpu", "cuda", "cuda:1" or "mps"'
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InvalidOptionError(explain_failure(tried, f"no device {device!r}", named, "correct it")) from error
    here = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not here.get(place.type, False):
        found = f"no {place.type} device that torch {torch.__version__} can use"
        raise InvalidOptionError(explain_failure(tried, found, "one", 'choose another, such as "cpu"'))
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        found, needed = f"{torch.cuda.device_count()} of them, counted from cuda:0", "one that is here"
        raise InvalidOptionError(explain_failure(tried, found, needed, "choose a lower number"))


def _default_device(torch: Any) -> str:
    if torch.cuda.is_available():
        return f"cuda:{torch.cuda.current_device()}"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _probe_cuda(torch: Any, name: str, shared: dict[str, Any]) -> DeviceFacts:
    arch_list = tuple(_or_default(torch.cuda.get_arch_list, []))
    try:
        index = torch.device(name).index
        index = torch.cuda.current_device() if index is None else index
        properties = torch.cuda.get_device_properties(index)
    except Exception as error:  # no driver, no card, a CPU build: each raises its own type
        return DeviceFacts(
            device=name,
            name="no usable CUDA device",
            arch_list=arch_list,
            refusals={"torch": f"torch cannot use {name}: {type(error).__name__}: {_first_line(error)}"},
            **shared,
        )
    # ROCm builds call their devices cuda too, and give numbers that are no NVIDIA compute capability
    amd = torch.version.hip is not None
    sm = None if amd else (int(properties.major), int(properties.minor))
    refusals = unusable_formats("cuda", sm, properties.name)
    if sm is not None and (reasons := missing_kernels(sm, arch_list)):
        refusals["torch"] = "; ".join(reasons)
    free_bytes, total_bytes = _or_default(lambda: torch.cuda.mem_get_info(index), (0, int(properties.total_memory)))
    return DeviceFacts(
        device=f"cuda:{index}",
        name=properties.name,
        sm=sm,
        arch_list=arch_list,
        total_bytes=int(total_bytes),
        free_bytes=int(free_bytes),
        multiprocessors=int(properties.multi_processor_count),
        tensor_cores=sm is not None and sm >= (7, 0) and not lacks_tensor_cores(sm, properties.name),
        refusals=refusals,
        triton=_has_triton(),
        notes=("an AMD card: SM rules do not apply, and nothing was measured on one",) if amd else (),
        **shared,
    )


def _memory_of(torch: Any, kind: str) -> tuple[int, int]:
    """Return (total_bytes, free_bytes) of a device that is not CUDA."""
    if kind == "cpu":
        return host_memory()
    if kind == "mps":
        total = int(_or_default(torch.mps.recommended_max_memory, 0))
        return total, max(0, total - int(_or_default(torch.mps.driver_allocated_memory, 0)))
    return 0, 0


def _has_triton() -> bool:
    # found and importable are two things: a Triton for another torch fails at import
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        importlib.import_module("triton")
    except Exception:  # a broken build may raise anything
        return False
    return True


def _versions(torch: Any) -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    versions["torch"] = str(torch.__version__)
    if torch.version.cuda:
        versions["cuda"] = str(torch.version.cuda)
        if cudnn := _or_default(torch.backends.cudnn.version, None):
            versions["cudnn"] = str(cudnn)
    return versions


def _or_default(call: Any, default: Any) -> Any:
    """Return what the call gives, or the default where this build or driver can't answer."""
    try:
        return call()
    except Exception:
        return default


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
