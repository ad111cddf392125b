"""Where a run took place: versions, device, host, and two rates measured on the spot.

What names a person, a machine or a place is not read: no host name, no user name, no path, no serial number.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..facts.device import DeviceFacts, probe

_PACKAGES = ("python", "torch", "cuda", "cudnn", "diffusers", "transformers", "accelerate", "xformers", "triton")
_RATES = ("matmul_tflops", "matmul_dtype", "matmul_size", "copy_gb_per_s", "copy_dtype", "copy_bytes")
_SMI_FIELDS = {"driver": "driver_version", "power_limit_w": "power.limit", "clock_limit_mhz": "clocks.max.sm"}


def read_environment(device: str, *, measure: bool = True) -> dict[str, Any]:
    """Return what a benchmark has to say about its device and packages, as plain data; absent things are None.

    Args:
        device: the torch device that the run uses.
        measure: also time a matrix product and a copy on it, which takes up to two seconds.

    >>> read_environment("cpu", measure=False)["device_type"]
    'cpu'
    """
    facts = probe(device)
    environment: dict[str, Any] = {
        "date_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": facts.device,
        "device_type": facts.device_type,
        "device_name": _cpu_name() if facts.device_type == "cpu" else facts.name,
        "sm": list(facts.sm) if facts.sm else None,
        "total_bytes": facts.total_bytes,
        "multiprocessors": facts.multiprocessors if facts.device_type == "cuda" else None,
        **_ask_nvidia_smi(facts),
        "os": _os_name(),
        "cpu": _cpu_name(),
        "cpu_cores": _usable_cores(),
        "cpu_threads": _torch_threads(),
        "versions": {name: facts.versions.get(name) for name in _PACKAGES} | {"diffusers_turbo": _own_version()},
        **dict.fromkeys(_RATES),
        "notes": list(facts.notes),
    }
    if reason := facts.refusals.get("torch"):
        environment["notes"].append(f"no rates measured: {reason}")
    elif measure:
        _measure(environment, facts)
    return environment


def _measure(environment: dict[str, Any], facts: DeviceFacts) -> None:
    from .rates import measure_rates

    dtype = "float16" if facts.device_type != "cpu" and facts.fp16 else "float32"
    try:
        environment.update(measure_rates(facts.device, dtype))
    except RuntimeError as error:  # torch's out-of-memory errors among them; a run goes on without its rates
        environment["notes"].append(f"no rates measured: {_without_paths(error)}")


def _without_paths(error: Exception) -> str:
    first_line = str(error).partition("\n")[0]
    return f"{type(error).__name__}: " + re.sub(r"\S*[/\\]\S*", "(a path)", first_line)


def _ask_nvidia_smi(facts: DeviceFacts) -> dict[str, Any]:
    """Ask for the card's driver, power limit and highest clock; None for what is not told."""
    answers: dict[str, Any] = dict.fromkeys(_SMI_FIELDS)
    if facts.device_type != "cuda" or facts.sm is None or (program := shutil.which("nvidia-smi")) is None:
        return answers
    import torch

    # CUDA_VISIBLE_DEVICES renumbers torch's devices but not nvidia-smi's, so the card is named by its id
    uuid = getattr(torch.cuda.get_device_properties(facts.device), "uuid", None)
    command = [program, f"--query-gpu={','.join(_SMI_FIELDS.values())}", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(
            command if uuid is None else [*command, f"--id=GPU-{uuid}"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return answers
    return answers | _read_smi(told)


def _read_smi(told: str) -> dict[str, Any]:
    """Read nvidia-smi's line: a text and two numbers, "[N/A]" for what the card does not tell.

    >>> _read_smi("550.54.15, 700.00, [N/A]\\n")
    {'driver': '550.54.15', 'power_limit_w': 700.0, 'clock_limit_mhz': None}
    """
    lines = told.strip().splitlines()
    parts = [part.strip() for part in lines[0].split(",")] if len(lines) == 1 else []
    if len(parts) != len(_SMI_FIELDS):
        return {}
    driver, *numbers = parts
    values = [None if "N/A" in driver else driver, *map(_number, numbers)]
    return dict(zip(_SMI_FIELDS, values, strict=True))


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine() or "CPU"


def _os_name() -> str:
    # not platform.platform(): a kernel's release may carry the name of whoever built it
    try:
        system = platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        system = f"{platform.system()} {platform.version() if platform.system() == 'Windows' else ''}".strip()
    return f"{system}, {platform.machine()}"


def _usable_cores() -> int | None:
    # a container may be allowed fewer than the machine has
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _torch_threads() -> int:
    import torch

    return torch.get_num_threads()


def _own_version() -> str | None:
    try:
        return importlib.metadata.version("diffusers-turbo")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        from .. import __version__

        return __version__
