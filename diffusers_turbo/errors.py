"""The errors of this package: one root, and a branch for each question a caller might ask of a failure.

Every message answers four questions in order: what was tried, what was found, what is needed, what to do next.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch


class TurboError(Exception):
    """Root of everything this package raises on purpose."""


class NotSupportedError(TurboError):
    """The switch does not apply to this pipeline, component or device."""


class InvalidOptionError(TurboError, ValueError):
    """An argument is outside what the switch accepts."""


class MissingPackageError(TurboError, ImportError):
    """An optional package is needed and not installed, or installed and not usable here."""


class ActionFailedError(TurboError):
    """An action failed half-way and was rolled back; the original error is its `__cause__`."""


class OutOfMemoryError(TurboError, torch.OutOfMemoryError):
    """Device memory ran out and nothing was left to make room with; torch's handlers of such errors catch it too."""


def with_causes(error: BaseException | None, *links: str) -> Iterator[BaseException]:
    """Iterate over an error and what led to it, each by the first of the attributes `links` that names another.

    >>> [str(found) for found in with_causes(ValueError("alone"), "__cause__", "__context__")]
    ['alone']
    """
    seen: list[BaseException] = []
    while error is not None and not any(error is other for other in seen):
        seen.append(error)
        yield error
        error = next((cause for link in links if (cause := getattr(error, link, None)) is not None), None)


def in_one_line(error: BaseException, most: int | None = None) -> str:
    """Name a foreign error and quote its text without line breaks, the first `most` characters of it.

    >>> in_one_line(ValueError("one\\ntwo"))
    'ValueError: one two'
    """
    return f"{type(error).__name__}: {' '.join(str(error).split())[:most]}"


def explain_failure(tried: str, found: str, needed: str, do: str) -> str:
    """Return the four-part message every `TurboError` of this package carries.

    >>> print(explain_failure("enable_tf32()", "device cpu", "an NVIDIA GPU of SM 8.0 or newer", "leave it off"))
    enable_tf32(): found device cpu; needed: an NVIDIA GPU of SM 8.0 or newer. What to do: leave it off.
    """
    return f"{tried}: found {found.rstrip('.')}; needed: {needed.rstrip('.')}. What to do: {do.rstrip('.')}."
