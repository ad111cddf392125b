"""Made-up results with every kind of row, for tests of what is done with results. No timing here was measured."""

from __future__ import annotations

import math
from dataclasses import dataclass

from diffusers_turbo.bench.cases import Case, Switch
from diffusers_turbo.bench.job import Job
from diffusers_turbo.bench.results import Results, Row, Status

GIB = 2**30

CASES = (
    Case(name="stock", description="as diffusers has it"),
    Case(name="sdpa-flash", switches=(Switch(action="enable_sdpa", options={"backend": "flash"}),)),
    Case(name="fp16", dtype="float16", switches=(Switch(action="enable_channels_last"),)),
    Case(name="automatic", auto={"batch_size": 2}),
    Case(name="naive", switches=(Switch(action="enable_naive_attention"),)),
    Case(name="xformers", switches=(Switch(action="enable_xformers_memory_efficient_attention"),)),
    Case(name="late"),
)

ENVIRONMENT = {
    "date_utc": "2026-01-02T03:04:05+00:00",
    "device": "cuda:0",
    "device_type": "cuda",
    "device_name": "Example GPU",
    "sm": [9, 0],
    "total_bytes": 80 * GIB,
    "driver": "550.54",
    "power_limit_w": 700.0,
    "os": "Example Linux 1, x86_64",
    "cpu": "Example CPU",
    "cpu_cores": 8,
    "versions": {"python": "3.11.7", "torch": "2.13.0", "cuda": "13.0", "diffusers": "0.42.1", "xformers": None},
    "matmul_tflops": 612.3,
    "matmul_dtype": "float16",
    "matmul_size": 8192,
    "copy_gb_per_s": 2900.0,
    "notes": ["a note on the device"],
}


@dataclass(frozen=True, kw_only=True)
class Point:
    """A measured attention call."""

    backend: str
    tokens: int
    microseconds: float | None
    peak_bytes: int | None


def job(**changes: object) -> Job:
    """A job of all sample cases at batch sizes 1 and 4."""
    return Job(**{"model": "arch:sd15", "cases": CASES, "batches": (1, 4), "rounds": 3, "dtype": "float32", **changes})


def results() -> Results:
    """Results with every kind of row; the last case is not reached at batch 4."""
    rows = []
    for batch in (1, 4):
        rows += [
            _timed("stock", batch, 2.0 * batch, 6 * GIB, verdict="exact", distance=_db(math.inf)),
            _timed("sdpa-flash", batch, 1.6 * batch, 5 * GIB, verdict="exact", distance=_db(96.25)),
            _timed("fp16", batch, 0.8 * batch, 3 * GIB, verdict="different", distance=_db(31.5)),
            _timed("automatic", batch, 0.78 * batch, 3 * GIB, verdict="close", distance=_db(44.0)),
        ]
        rows[-2].verdict_reasons = ["31.5 dB | from the reference", "below 40 dB"]
    out = "OutOfMemoryError: tried to allocate\n 64.00 GiB"
    rows += [
        _timed("naive", 1, 3.1, 9 * GIB, verdict="exact", distance=_db(120.0)),
        Row(case="naive", batch=4, steps=50, status=Status.OUT_OF_MEMORY, reason=out, first_image_s=0.5, seconds=[9.0]),
        Row(case="xformers", batch=1, steps=50, status=Status.UNSUPPORTED, reason="xFormers is not installed"),
        Row(case="xformers", batch=4, steps=50, status=Status.FAILED, reason="RuntimeError: [b] broke"),
        Row(case="late", batch=1, steps=50, status=Status.PARTIAL, reason="interrupted", seconds=[1.9]),
        Row(case="late", batch=4, steps=50),
    ]
    return Results(job=job(), environment=dict(ENVIRONMENT), rows=rows, started="2026-01-02T03:04:05+00:00")


def _timed(case: str, batch: int, median_s: float, peak_bytes: int, **rest: object) -> Row:
    return Row(
        case=case,
        batch=batch,
        steps=50,
        status=Status.OK,
        load_s=3.5,
        apply_s=0.1,
        first_image_s=median_s + 1,
        warmup_s=[median_s],
        seconds=[median_s * 0.98, median_s, median_s * 1.05],
        peak_allocated_bytes=peak_bytes * (3 + batch) // 4,
        peak_reserved_bytes=peak_bytes * 2,
        peak_host_bytes=2 * GIB,
        **rest,
    )


def _db(psnr_db: float) -> dict[str, object]:
    """As `Verification.as_dict()` gives it, of which tables read these."""
    ours = {"pictures": 8, "rmse": 10 ** (-psnr_db / 20), "psnr_db": psnr_db, "worst_psnr_db": psnr_db - 1}
    return {"reference": "fp32, naive attention", "ours": ours, "stock": None, "ssim": 0.99, "flip": None}
