"""Reading TOML files whose every key is known: what does not fit is refused by file, table and key."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Collection, Iterable, Mapping
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from ..errors import InvalidOptionError, explain_failure


def read_toml(path: str | Path | Traversable) -> dict[str, Any]:
    """Return what a TOML file holds.

    Raises:
        InvalidOptionError: no such file, not readable, or no TOML; the text names file, line and column.
    """
    file = Path(path) if isinstance(path, str) else path
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        found = f"no readable file ({type(error).__name__}: {error.strerror or error})"
        raise refuse(str(file), found, "a TOML file", "correct the path") from error
    except UnicodeDecodeError as error:
        raise refuse(str(file), f"bytes that are not UTF-8 ({error})", "UTF-8 text", "save it as UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise refuse(str(file), f"a syntax error: {error}", "valid TOML", "correct that line") from error


def check_table(value: object, where: str) -> dict[str, Any]:
    """Return `value` if it is a table.

    Raises:
        InvalidOptionError: it is something else.
    """
    if not isinstance(value, dict):
        raise refuse(where, f"{value!r}", "a table", "write it as [name] with keys below")
    return value


def check_keys(table: Mapping[str, Any], known: Collection[str], where: str, required: Iterable[str] = ()) -> None:
    """Check that a table holds known keys only, and all that are required.

    Raises:
        InvalidOptionError: an unknown key (with the known ones closest to it), or a missing one.
    """
    for key in table:
        if key not in known:
            found = f"unknown key {key!r}{did_you_mean(key, known)}"
            raise refuse(where, found, f"keys among {', '.join(known)}", f"correct or remove {key!r}")
    if missing := [key for key in required if key not in table]:
        raise refuse(where, f"no key {', '.join(missing)}", f"all of {', '.join(required)}", "add what is missing")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a question that offers the closest of the known names, or nothing.

    >>> did_you_mean("sdpq", ["naive", "sdpa"])
    ' (did you mean sdpa?)'
    """
    close = difflib.get_close_matches(name, list(known), n=3)
    return f" (did you mean {' or '.join(close)}?)" if close else ""


def what_to_choose(name: object, known: Iterable[str], otherwise: str, most: int = 3) -> str:
    """Return what to do about a name that is none of the known ones: take the closest, or what is said otherwise.

    >>> what_to_choose("ddm", ["ddim", "euler"], "choose one of these")
    "did you mean 'ddim'?"
    """
    close = difflib.get_close_matches(str(name), list(known), n=most)
    return f"did you mean {' or '.join(map(repr, close))}?" if close else otherwise


def refuse(tried: str, found: str, needed: str, do: str) -> InvalidOptionError:
    """Return the error of this room, with the text every error of the package has."""
    return InvalidOptionError(explain_failure(tried, found, needed, do))
