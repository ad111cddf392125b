"""Files that hold what torch's compiler made, one for each key, in a folder that only this user can write to.

A file is a line of JSON (the header: format, key, and for each part its length, checksum and artifacts' names) and the
parts, each as `torch.compiler.save_cache_artifacts()` gave it. Parts hold code that will run: whatever was not written
by this user, or not as it is now, is refused and made anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import NotSupportedError, explain_failure
from ..trusted import private_folder, read_trusted

FOLDER_VARIABLE = "DIFFUSERS_TURBO_CACHE"
FORMAT = "diffusers_turbo compiled code, 1"
SUFFIX = ".compiled"

MAX_FILES = 128
MAX_BYTES = 4 * 2**30
"""What a folder may hold. Beyond it the files that were longest not used are deleted."""

MAX_PARTS = 8
"""Of one file: each process that compiled something new adds one, and drops those whose artifacts it has itself."""

Key = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one process saved: the artifacts' bytes, and their names (kind and torch's own key)."""

    data: bytes
    artifacts: frozenset[str]


def default_folder() -> Path:
    """Return where files go when no folder was named: $DIFFUSERS_TURBO_CACHE, or the user's folder for caches."""
    if named := os.environ.get(FOLDER_VARIABLE):
        return Path(named).expanduser()
    # https://specifications.freedesktop.org/basedir-spec/latest/: a path that is not absolute is to be ignored
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "diffusers_turbo"


def file_of(folder: Path, key: Key) -> Path:
    """Return where the artifacts of a key lie: a name for people, and the key's hash."""
    name = re.sub(r"[^A-Za-z0-9]+", "-", f"{key.get('model', '')} {key.get('device', '')}").strip("-")
    return folder / f"{name}-{hash_of(key)[:20]}{SUFFIX}"


def hash_of(value: Any) -> str:
    """Return a hash of plain data, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def read_parts(file: Path, key: Key) -> list[Part]:
    """Return the parts of a key's file.

    Raises:
        FileNotFoundError: there is none.
        NotSupportedError: others could have written it, or it is not a whole file of this key.
        OSError: it cannot be read.
    """
    if not os.path.lexists(file):
        raise FileNotFoundError(file)
    line, _, rest = read_trusted(file).partition(b"\n")
    try:
        header = json.loads(line)
        if header["format"] != FORMAT:
            raise _refuse(file, f"another format ({header['format']})")
        if header["key"] != _plain(key):
            raise _refuse(file, f"another key ({_difference(header['key'], _plain(key))})")
        parts = []
        for told in header["parts"]:
            data, rest = rest[: told["bytes"]], rest[told["bytes"] :]
            if hashlib.sha256(data).hexdigest() != told["sha256"]:
                raise _refuse(file, "truncated or changed bytes (their checksum differs)")
            parts.append(Part(data=data, artifacts=frozenset(told["artifacts"])))
    except (ValueError, KeyError, TypeError) as error:
        raise _refuse(file, f"a header that cannot be read ({type(error).__name__})") from error
    return parts


def write_parts(file: Path, key: Key, parts: Iterable[Part]) -> int:
    """Write a key's file at once or not at all, make room in its folder, and return the file's bytes.

    Raises:
        NotSupportedError: the folder cannot be made, or is not to be trusted.
        OSError: it cannot be written, a full disk for example; what was there is still there.
    """
    folder = private_folder(file.parent)
    parts = list(parts)
    told = [
        {"bytes": len(part.data), "sha256": hashlib.sha256(part.data).hexdigest(), "artifacts": sorted(part.artifacts)}
        for part in parts
    ]
    header = json.dumps({"format": FORMAT, "key": _plain(key), "parts": told}).encode()
    # made with mode 0600
    descriptor, temporary = tempfile.mkstemp(prefix=".", suffix=SUFFIX, dir=folder)
    try:
        with open(descriptor, "wb") as open_file:
            open_file.writelines((header, b"\n", *(part.data for part in parts)))
        size = os.stat(temporary).st_size
        os.replace(temporary, file)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    make_room(folder, keep=file)
    return size


def joined(old: Iterable[Part], new: Part) -> list[Part]:
    """Return the newest part first, then those that hold what it does not; the oldest of too many go."""
    kept = [part for part in old if not part.artifacts <= new.artifacts]
    return [new, *kept][:MAX_PARTS]


def make_room(folder: Path, keep: Path) -> None:
    """Delete the files that were longest not used, until the folder is within its limits; never `keep`."""
    found = []
    for path in folder.glob(f"*{SUFFIX}"):
        with contextlib.suppress(OSError):  # another process was faster
            status = path.lstat()
            found.append((path != keep, -status.st_mtime, status.st_size, path))
    total = 0
    for number, (other, _, size, path) in enumerate(sorted(found), start=1):
        total += size
        if other and (number > MAX_FILES or total > MAX_BYTES):
            with contextlib.suppress(OSError):
                path.unlink()
            total -= size


def mark_used(file: Path) -> None:
    """Note that a file is in use, so that it is not among the oldest."""
    with contextlib.suppress(OSError):
        os.utime(file)


def _refuse(file: Path, found: str) -> NotSupportedError:
    return NotSupportedError(
        explain_failure(f"reading {file}", found, "a whole file of this key", "nothing: it is made anew")
    )


def _plain(key: Key) -> Any:
    return json.loads(json.dumps(key, default=str))


def _difference(found: Any, wanted: Any) -> str:
    if not isinstance(found, dict):
        return "no mapping"
    names = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
    return ", ".join(f"{name} {found.get(name)} instead of {wanted.get(name)}" for name in names)
