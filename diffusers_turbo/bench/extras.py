"""The optional packages of the extra `cli`, and one error for all of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import MissingPackageError, explain_failure


@contextmanager
def needs_extra(tried: str) -> Iterator[None]:
    """Import optional packages inside this block.

    Raises:
        MissingPackageError: one of them is not installed.
    """
    try:
        yield
    except ImportError as error:
        do = 'install it with pip install "diffusers-turbo[cli]"'
        raise MissingPackageError(explain_failure(tried, str(error), "a package of the extra cli", do)) from error
