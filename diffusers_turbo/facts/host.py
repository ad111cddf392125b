"""The machine around the device: its memory and its compiler. Read from the system, never raising."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

_CGROUP_FILES = (
    # (limit, usage) of cgroup v2, then v1
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
_COMPILERS = ("c++", "g++", "clang++", "cl")


def host_memory() -> tuple[int, int]:
    """Return (total_bytes, available_bytes) of host memory; (0, 0) where the system does not say.

    A container's limit counts where it is below the machine's memory.
    """
    total, available = _meminfo() or _sysconf() or _windows() or (0, 0)
    for limit_file, usage_file in _CGROUP_FILES:
        limit, usage = _read_int(limit_file), _read_int(usage_file)
        if limit is not None and usage is not None and 0 < limit < total:
            return limit, max(0, min(available, limit - usage))
    return total, available


def cxx_compiler() -> str | None:
    """Return the C++ compiler that torch.compile would call: $CXX if set and found, else the first on the path."""
    if named := os.environ.get("CXX"):
        return shutil.which(named.split()[0])
    return next((path for name in _COMPILERS if (path := shutil.which(name))), None)


def _meminfo() -> tuple[int, int] | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        values = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith("kB")}
        return values["MemTotal"], values["MemAvailable"]
    except (OSError, ValueError, KeyError, IndexError):
        return None


def _sysconf() -> tuple[int, int] | None:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
    # macOS tells no available memory here; half is what a desktop usually has left
    return total, total // 2


def _windows() -> tuple[int, int] | None:
    if sys.platform != "win32":
        return None
    import ctypes

    class Status(ctypes.Structure):
        _fields_ = [
            ("length", ctypes.c_ulong),
            ("load", ctypes.c_ulong),
            *((name, ctypes.c_ulonglong) for name in ("total", "free", "a", "b", "c", "d", "e")),
        ]

    status = Status(length=ctypes.sizeof(Status))
    if not ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
        return None
    return int(status.total), int(status.free)


def _read_int(path: str) -> int | None:
    try:
        return int(Path(path).read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def cpu_flags() -> frozenset[str]:
    """Return the instruction sets of the CPU as Linux names them; empty where the system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return frozenset()
    # "flags" on x86, "Features" on Arm
    found = (line.partition(":") for line in lines if line.startswith(("flags", "Features")))
    return frozenset(next((flags for _, _, flags in found), "").split())
