"""What every command prints with: results on standard output, progress on standard error."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

results = Console(soft_wrap=True)
"""For what was asked for."""

notices = Console(stderr=True, soft_wrap=True)
"""For what goes on meanwhile."""


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """Show one bar; it is told what is being done, how much is done, and how much there will be."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=notices, transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def tell(doing: str, done: int, total: int) -> None:
            bar.update(task, description=doing, completed=done, total=total)

        yield tell


def hush_libraries() -> None:
    """Let only errors of the libraries below through: their advice is about calls that the user did not write."""
    import diffusers
    import transformers

    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("xformers").setLevel(logging.ERROR)
