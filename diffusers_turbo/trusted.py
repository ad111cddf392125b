"""Whether a file or folder may be trusted with code that will run: nobody else can have written it.

The rule is that of OpenSSH's StrictModes: the path is the user's own, nobody else may write to it, and nobody else may
exchange a folder above it. Where a system knows no owners and modes (Windows), only links and kinds are looked at.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from .errors import NotSupportedError, explain_failure

_POSIX = hasattr(os, "geteuid")


def reasons_not_to_trust(path: Path) -> list[str]:
    """Return why what lies at `path` must not be loaded as code; an empty list means that it may.

    Looks at the path itself (the user's own, a plain file or folder, no symbolic link, not writable by group or others)
    and at the folders above it (the user's or root's, and others can exchange nothing in them).
    """
    path = Path(os.path.abspath(path))
    try:
        reasons = _of_status(path, os.lstat(path))
        # links above are followed: what counts is where they lead
        real = path.parent.resolve(strict=True)
        for folder in (real, *real.parents):
            reasons += _of_folder_above(folder)
    except OSError as error:
        return [f"{path} cannot be looked at ({error.strerror or error})"]
    return reasons


def private_folder(path: Path) -> Path:
    """Return the folder, made if it was missing, with everything missing above it, for this user alone (mode 0700).

    Raises:
        NotSupportedError: it cannot be made, or it is there and not to be trusted.
    """
    path = Path(os.path.abspath(path))
    tried, needed = f"using the folder {path}", "a folder that this user alone can write to"
    try:
        for missing in reversed([folder for folder in (path, *path.parents) if not os.path.lexists(folder)]):
            missing.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        found = f"{error.strerror or error} ({error.filename})"
        raise NotSupportedError(explain_failure(tried, found, needed, "name another folder")) from error
    reasons = reasons_not_to_trust(path) if path.is_dir() else [f"{path} is no folder"]
    if reasons:
        do = "mend its owner and mode (chmod go-w), or name another folder"
        raise NotSupportedError(explain_failure(tried, "; ".join(reasons), needed, do))
    return path


def read_trusted(path: Path) -> bytes:
    """Return the bytes of a file that may be trusted; what was checked is what is read, even if it is exchanged.

    Raises:
        NotSupportedError: it is not to be trusted.
        OSError: it cannot be read.
    """
    path = Path(os.path.abspath(path))
    # O_NONBLOCK: opening a pipe would wait for its writer
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    reasons = reasons_not_to_trust(path)
    if not reasons:
        with open(path, "rb", opener=lambda name, _: os.open(name, flags)) as file:
            status = os.fstat(file.fileno())
            reasons = _of_status(path, status)
            if not stat.S_ISREG(status.st_mode):
                reasons.append(f"{path} is no file")
            if not reasons:
                return file.read()
    needed, do = "a file that this user alone can have written", "delete it, or mend its owner and mode (chmod go-w)"
    raise NotSupportedError(explain_failure(f"reading {path}", "; ".join(reasons), needed, do))


def _of_status(path: Path, status: os.stat_result) -> list[str]:
    mode = status.st_mode
    if stat.S_ISLNK(mode):
        return [f"{path} is a symbolic link"]
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        return [f"{path} is neither a file nor a folder"]
    reasons = []
    if _POSIX:
        if status.st_uid != os.geteuid():
            reasons.append(f"{path} belongs to another user (number {status.st_uid})")
        reasons += _writers(path, mode)
    return reasons


def _of_folder_above(folder: Path) -> list[str]:
    """Say why others could put something of theirs in the place of what lies in this folder."""
    status = os.stat(folder)
    if not _POSIX:
        return []
    reasons = []
    if status.st_uid not in (0, os.geteuid()):
        reasons.append(f"{folder} above it belongs to another user (number {status.st_uid})")
    # in a sticky folder, such as /tmp, only its owner can rename or remove a file
    if not status.st_mode & stat.S_ISVTX:
        reasons += _writers(folder, status.st_mode)
    return reasons


def _writers(path: Path, mode: int) -> list[str]:
    who = [name for bit, name in ((stat.S_IWGRP, "its group"), (stat.S_IWOTH, "everybody")) if mode & bit]
    return [f"{path} can be written to by {' and '.join(who)}"] if who else []
