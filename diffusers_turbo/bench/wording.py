"""Results in words: numbers as a reader wants them, and the lines that say where and how they were measured."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import PurePosixPath, PureWindowsPath

from .job import Job
from .results import Results, Row, Status

_GIB = 2**30


def digits(value: float, significant: int = 3) -> str:
    """Print a number with so many significant digits and no exponent.

    >>> digits(1234.5), digits(1.2345), digits(0.0012345)
    ('1234', '1.23', '0.00123')
    """
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    return f"{value:.{max(0, significant - 1 - math.floor(math.log10(abs(value))))}f}"


def outcome(row: Row, rounds: int) -> str:
    """Say in one line what there is to say beside a row's numbers, or instead of them: verdict, reasons, CPU-bound.

    Args:
        row: the row.
        rounds: how many it should have had.
    """
    said = [f"{len(row.seconds)} of {rounds} rounds"] if row.measured and row.status is not Status.OK else []
    said += [text for text in (row.reason, row.verdict, "; ".join(row.verdict_reasons)) if text]
    found = [" ".join(": ".join(said).split())] if said else []
    return "; ".join([*found, *([_bound(row)] if row.measured and row.launch_bound else [])])


def _bound(row: Row) -> str:
    interval = row.median_interval_s
    between = f", median {digits(interval[0])} to {digits(interval[1])} s (95 % bootstrap)" if interval else ""
    return f"the CPU is the bound: GPU busy {row.busy_share:.0%}{between}"


def model_name(job: Job) -> str:
    """Name the model without the folders it lies in, which are nobody's business in a table.

    >>> from .cases import Case
    >>> [model_name(Job(model=name, cases=[Case(name="stock")])) for name in ("/home/me/models/sd15", "org/sd15")]
    ['sd15', 'org/sd15']
    """
    name = job.model
    # a Hub id has one slash at most and does not begin with a dot; whatever else has slashes is a folder
    folder = PurePosixPath(name).is_absolute() or name[:1] in (".", "~") or name.count("/") > 1
    if folder or "\\" in name or PureWindowsPath(name).drive:
        return PureWindowsPath(name).name or "a local model"
    return name


def device_line(results: Results) -> str:
    """Say on what it ran: "NVIDIA H100 80GB HBM3, SM 9.0, 79.2 GiB, driver 550.54, power limit 700 W"."""
    found = results.environment
    parts = [str(found.get("device_name") or results.job.device)]
    if sm := found.get("sm"):
        parts.append("SM " + ".".join(map(str, sm)))
    if total_bytes := found.get("total_bytes"):
        parts.append(f"{digits(total_bytes / _GIB)} GiB")
    if driver := found.get("driver"):
        parts.append(f"driver {driver}")
    if power := found.get("power_limit_w"):
        parts.append(f"power limit {power:.0f} W")
    if found.get("device_type") == "cpu" and (threads := found.get("cpu_threads")):
        parts.append(f"{threads} threads" if threads > 1 else "1 thread")
    return ", ".join(parts)


def environment_line(results: Results) -> str:
    """Say where it ran: device, rates measured in the run, versions, system, date."""
    found = results.environment
    parts = [device_line(results)]
    if (tflops := found.get("matmul_tflops")) is not None:
        parts.append(
            f"measured {digits(tflops)} TFLOPS ({found.get('matmul_dtype')} matmul, {found.get('matmul_size')} cubed)"
            f" and {digits(found.get('copy_gb_per_s') or 0)} GB/s (copy, read and write)"
        )
    versions = found.get("versions") or {}
    parts.append(", ".join(f"{name} {version}" for name, version in versions.items() if version))
    parts += [str(found[name]) for name in ("os", "date_utc") if found.get(name)]
    return "; ".join(part for part in parts if part)


def job_line(results: Results) -> str:
    """Say what was run: model, task, size, steps and what else was asked."""
    job = results.job
    size = f"{job.width or 'own'} x {job.height or 'own'} pixels" if job.width or job.height else "the model's own size"
    parts = [model_name(job), job.task, size, f"{job.steps} steps"]
    if job.guidance_scale is not None:
        parts.append(f"guidance {job.guidance_scale:g}")
    parts += [f"scheduler {job.scheduler}"] if job.scheduler else []
    parts.append(f"seed {job.seed}")
    return ", ".join(parts)


def protocol_line(results: Results) -> str:
    """Say how it was measured, as far as that is the same for every row."""
    job = results.job
    timed = [row for row in results.rows if row.measured]
    whole = "prompt to picture" if job.decode else "prompt to latents, without the VAE"
    order = "each configuration isolated in its own process" if job.isolate else "configurations interleaved"
    rounds = _span(len(row.seconds) for row in timed) if timed else job.rounds
    sentences = [
        f"{rounds} rounds of whole calls ({whole}), {order}; median and quartiles",
        _warmups(timed, job),
        f"Positive percentages are faster than {results.baseline} at the same batch size",
        _distance(results),
        *_profiled(timed),
    ]
    return "Protocol: " + ". ".join(sentences) + "."


def _profiled(timed: list[Row]) -> list[str]:
    found = any(row.busy_s is not None for row in timed)
    return ["GPU busy: the share of the call with a kernel or copy on the GPU, from a profile"] if found else []


def _warmups(timed: list[Row], job: Job) -> str:
    if not timed:
        return f"Warm-up excluded: {job.warmup} calls"
    first = "the first call (first image)" if any(row.first_image_s is not None for row in timed) else ""
    further = _span(len(row.warmup_s) for row in timed)
    more = f"{further} further warm-up {'call' if further == '1' else 'calls'}" if further != "0" else ""
    excluded = " and ".join(part for part in (first, more) if part)
    return f"Warm-up excluded: {excluded}" if excluded else "No warm-up"


def _distance(results: Results) -> str:
    found = [row.distance for row in results.rows if row.distance]
    if not found:
        return "No distance measured"
    references = sorted({str(item["reference"]) for item in found if item.get("reference")})
    against = f" against {' and '.join(references)}" if references else ""
    return f"dB is the PSNR over {results.job.pairs} prompt-and-seed pairs{against}; inf: equal to the bit"


def _span(counts: Iterable[int]) -> str:
    numbers = sorted(set(counts))
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
