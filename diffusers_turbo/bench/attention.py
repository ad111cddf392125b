"""One attention call by backend and number of tokens: microseconds and peak bytes, the lesson of N squared."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..attention import (
    NaiveAttnProcessor,
    SDPAAttnProcessor,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
from ..attention.base import TurboAttnProcessor
from ..attention.limits import AttentionLayer
from ..errors import in_one_line
from .clock import seconds_a_call
from .live_bytes import LiveBytes
from .reading import did_you_mean, refuse
from .running import free_memory

HEADS, HEAD_DIM = 8, 40
"""Of SD1.5's layers of 4096 tokens, where nearly all of its attention goes."""

TOKENS = (256, 512, 1024, 2048, 4096, 8192, 16384)

BACKENDS: dict[str, Callable[[], TurboAttnProcessor]] = {
    "naive": NaiveAttnProcessor,
    "sliced": SlicedAttnProcessor,
    "sdpa math": lambda: SDPAAttnProcessor("math"),
    "sdpa auto": SDPAAttnProcessor,
    "sdpa flash": lambda: SDPAAttnProcessor("flash"),
    "sdpa efficient": lambda: SDPAAttnProcessor("efficient"),
    "sdpa cudnn": lambda: SDPAAttnProcessor("cudnn"),
    "xformers": XFormersAttnProcessor,
}
"""What is measured, by the name in tables and plots."""

# One timed sample lasts at least this long, so that the clock's grain and a launch's cost do not count.
_SAMPLE_S = 0.005


@dataclass(frozen=True, kw_only=True)
class Point:
    """One backend at one number of tokens.

    Attributes:
        backend: its name.
        tokens: N of queries `[B, H, N, D]` and of keys.
        microseconds: median of the samples; None when it did not run.
        peak_bytes: beyond q, k and v: the device's allocator on a GPU, live tensors on a CPU.
        samples: every sample, microseconds a call.
        reason: why it did not run.
    """

    backend: str
    tokens: int
    microseconds: float | None = None
    peak_bytes: int | None = None
    samples: tuple[float, ...] = ()
    reason: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


class _Layer:
    """What a processor asks of the layer it stands in for."""

    heads = HEADS
    scale = HEAD_DIM**-0.5
    upcast_attention = upcast_softmax = False


def measure_attention(
    device: str,
    dtype: str,
    *,
    tokens: Sequence[int] = TOKENS,
    batch: int = 2,
    rounds: int = 10,
    backends: Sequence[str] = tuple(BACKENDS),
) -> Iterator[Point]:
    """Measure self-attention `[B, 8, N, 40]` at each number of tokens, backends interleaved; yield points as they come.

    Args:
        device, dtype: where and in what.
        tokens: the numbers of tokens.
        batch: B; 2 is one picture with guidance.
        rounds: samples of each backend.
        backends: names out of `BACKENDS`.

    Raises:
        InvalidOptionError: no backend has this name.
    """
    for name in backends:
        if name not in BACKENDS:
            found, needed = f"no backend {name!r}{did_you_mean(name, BACKENDS)}", f"some of {', '.join(BACKENDS)}"
            raise refuse("measure_attention()", found, needed, "correct the name")
    return _points(device, dtype, tokens, batch, rounds, backends)


def _points(
    device: str, dtype: str, tokens: Sequence[int], batch: int, rounds: int, backends: Sequence[str]
) -> Iterator[Point]:
    place, kind = torch.device(device), getattr(torch, dtype)
    for count in tokens:
        generator = torch.Generator().manual_seed(count)
        shape = (batch, HEADS, count, HEAD_DIM)
        states = tuple(torch.randn(shape, generator=generator).to(place, kind) for _ in range(3))
        runs, points = {}, {}
        for name in backends:
            found = _prepare(name, states)
            if isinstance(found, str):
                points[name] = Point(backend=name, tokens=count, reason=found)
            else:
                runs[name] = found
        samples: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(rounds):
            for name, run in runs.items():
                samples[name].append(run.sample())
        for name, run in runs.items():
            points[name] = Point(
                backend=name,
                tokens=count,
                microseconds=statistics.median(samples[name]),
                peak_bytes=run.peak_bytes,
                samples=tuple(samples[name]),
            )
        yield from (points[name] for name in backends)


@dataclass
class _Run:
    call: Callable[[], Tensor]
    device: torch.device
    repeats: int
    peak_bytes: int

    def sample(self) -> float:
        """Return the microseconds of one call, over as many as make a sample."""
        return 1e6 * seconds_a_call(self.call, self.device, self.repeats)


def _prepare(name: str, states: tuple[Tensor, ...]) -> _Run | str:
    """Warm one backend up and measure its memory; return why, if it cannot run."""
    query = states[0]
    processor: Any = BACKENDS[name]()
    device = query.device
    sm = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    layer = AttentionLayer(heads=HEADS, head_dim=HEAD_DIM, dtype=query.dtype, device=device, sm=sm)
    if reasons := processor.reasons_here(layer):
        return "; ".join(reasons)

    @torch.no_grad()
    def call() -> Tensor:
        output: Tensor = processor.attend(_Layer, *states, None)
        return output

    try:
        peak_bytes = _peak_bytes(call, device)
        run = _Run(call=call, device=device, repeats=1, peak_bytes=peak_bytes)
        run.repeats = max(1, round(1e6 * _SAMPLE_S / min(run.sample() for _ in range(2))))
    except (torch.OutOfMemoryError, RuntimeError) as error:
        free_memory(device)
        return in_one_line(error, 200)
    return run


def _peak_bytes(call: Callable[[], Tensor], device: torch.device) -> int:
    if device.type != "cuda":
        memory = LiveBytes()
        with memory:
            call()
        return memory.peak
    call()  # workspaces that libraries keep are not this call's
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    peak: int = torch.cuda.max_memory_allocated(device) - before
    return peak
