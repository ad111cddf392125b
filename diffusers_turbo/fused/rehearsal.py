"""The variants of the kernels, compiled side by side before the first picture would ask for them one after the other.

Triton compiles each variant at its first launch, for more than half a second, and most of that outside of Python's
lock. So each is launched once on a few elements, from as many threads as there are cores. What an earlier process left
in Triton's cache is only loaded.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

MOST_THREADS = 8


@dataclass(frozen=True)
class Rehearsal:
    """One launch on a few elements; those of one key are the same variant."""

    key: Hashable
    launch: Callable[[], object]


def rehearse(rehearsals: Iterable[Rehearsal], threads: int | None = None) -> tuple[int, list[Exception]]:
    """Launch one rehearsal of each key; return how many, and what went wrong with any.

    A failure is none of the pipeline's: what was not compiled here is compiled at its first launch.
    """
    variants = list({rehearsal.key: rehearsal for rehearsal in rehearsals}.values())
    if not variants:
        return 0, []

    def launch(rehearsal: Rehearsal) -> Exception | None:
        try:
            with torch.no_grad():  # which is a setting of each thread
                rehearsal.launch()
        except Exception as error:
            return error
        return None

    with ThreadPoolExecutor(min(threads or os.cpu_count() or 1, MOST_THREADS, len(variants))) as pool:
        failed = [error for error in pool.map(launch, variants) if error is not None]
    return len(variants) - len(failed), failed
