"""Writing a file whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from .reading import refuse


def write_whole(path: str | Path, content: str | bytes, what: str) -> None:
    """Write `content` so that a reader, or a power cut, never sees half of it; missing folders are made.

    Args:
        path: where to.
        content: text is written as UTF-8, with its line ends as they are.
        what: what is being written, for the error text: "the results".

    Raises:
        InvalidOptionError: the folder cannot be made or written to, or the disk is full.
    """
    target = Path(path)
    # beside the target, since os.replace is atomic only within one file system; the process id keeps two runs apart
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("wb") as file:
                file.write(content if isinstance(content, bytes) else content.encode())
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise refuse(
            f"writing {what} to {target}",
            f"{type(error).__name__}: {error.strerror or error}",
            "a folder that can be made and written to, with room left",
            "choose another place with --out, or correct the folder's rights",
        ) from error
