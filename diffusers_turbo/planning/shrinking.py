"""What to ask for instead, when a picture did not fit: the smallest change that the estimate says would."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from .ladder import TILE_SIZES
from .memory import estimate_memory
from .options import Options, VAETiling
from .units import gib

if TYPE_CHECKING:
    from ..facts.pipeline import PipelineFacts

LESS = 0.95
"""What failed is not tried again under another name: a suggestion has to need less than this share of it."""


def suggest(
    facts: PipelineFacts,
    stage: str,
    *,
    height: int,
    width: int,
    batch_size: int,
    options: Sequence[Options] = (),
    usable_bytes: int | None = None,
    tiling: bool = False,
) -> str:
    """Return what to do instead of a call whose stage ("encode", "denoise", "decode") ran out of memory.

    Args:
        facts: the pipeline as it stands.
        stage: where memory ran out.
        height, width: pixels of the call.
        batch_size: pictures of the call.
        options: switches in force that the pipeline does not show by itself.
        usable_bytes: what the device has for this process, None when unknown; then anything smaller is suggested.
        tiling: whether VAE tiling was allowed, and tried.
    """

    failed = estimate_memory(facts, height, width, batch_size, options).stage(stage).peak_bytes
    limit = min(int(failed * LESS), usable_bytes or failed)
    for text, size, more in _smaller(facts, height, width, batch_size, tiling=stage == "decode" and not tiling):
        needed = estimate_memory(facts, *size, [*options, *more]).stage(stage).peak_bytes
        if needed <= limit:
            return f"{text}: its {stage} stage is estimated at {gib(needed)}, that of this call at {gib(failed)}"
    return "use a larger card or half precision (enable_half_precision()), or free what other programs hold"


Smaller = tuple[str, tuple[int, int, int], tuple[Options, ...]]


def _smaller(facts: PipelineFacts, height: int, width: int, batch_size: int, *, tiling: bool) -> Iterator[Smaller]:
    for batch in range(batch_size - 1, 0, -1):
        yield f"make {batch} at a time", (height, width, batch), ()
    if tiling and max(height, width) > TILE_SIZES[-1]:
        text = "enable_memory_fallback(allow_tiling=True), which is lossy"
        yield text, (height, width, batch_size), (VAETiling(tile_size=TILE_SIZES[-1]),)
    step = facts.size_multiple
    for share in (0.75, 0.5, 0.25):
        rows, columns = (max(step, int(side * share) // step * step) for side in (height, width))
        yield f"make one of {columns}x{rows} at a time", (rows, columns, 1), ()
