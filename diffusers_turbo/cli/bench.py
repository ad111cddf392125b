"""`bench`: configurations side by side on this machine; suites of published tables; attention alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ..bench.attention import BACKENDS, TOKENS, Point, measure_attention
from ..bench.beside import published_lines
from ..bench.cases import Case, builtin_cases, find_cases
from ..bench.environment import read_environment
from ..bench.job import ARCHITECTURE, Job
from ..bench.plots import plot_attention, plot_bars, plot_memory
from ..bench.reading import refuse
from ..bench.results import Results
from ..bench.session import run
from ..bench.strict_json import dumps, to_plain
from ..bench.suites import Section, read_suite, suites
from ..bench.tables import csv_text, markdown, rich_table
from ..bench.writing import write_whole
from ..errors import MissingPackageError
from ..facts.probing import require_device
from . import arguments as arg
from .output import notices, progress_bar, results

NOTHING_MEASURED, INTERRUPTED = 1, 130

DEFAULT_CONFIGS = ["stock", "auto"]

app = typer.Typer(help="Measure configurations against each other, interleaved, quality beside speed.")

Out = Annotated[Path, typer.Option("--out", help="Folder for results.json, .csv, .md and plots; a run there goes on.")]
Rounds = Annotated[int | None, typer.Option("--rounds", help="Timed calls of each configuration. Default: 10.")]


@app.callback(invoke_without_command=True)
def bench(
    context: typer.Context,
    model: arg.Model = None,
    arch: arg.Arch = None,
    suite: Annotated[str | None, typer.Option(help="A published table's protocol: " + ", ".join(suites()))] = None,
    section: Annotated[str | None, typer.Option(help="Only this section of the suite.")] = None,
    task: Annotated[str, typer.Option(help="txt2img, img2img or inpaint.")] = "txt2img",
    configs: Annotated[list[str], typer.Option(help="Configurations by name; see --list.")] = [],  # noqa: B006
    cases: arg.ExtraCases = None,
    baseline: Annotated[str | None, typer.Option(help="What the others are compared with. Default: the first.")] = None,
    batch: Annotated[list[int], typer.Option(help="Pictures per call: --batch 1 2 4")] = [],  # noqa: B006
    size: arg.Size = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps. Default: 50.")] = None,
    scheduler: arg.Scheduler = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale. Default: the pipeline's own.")] = None,
    prompt: Annotated[list[str], typer.Option(help="Of the timed calls.")] = ["A photo"],  # noqa: B006
    seed: Annotated[int, typer.Option(help="Of the timed calls.")] = 1,
    rounds: Rounds = None,
    warmup: Annotated[int, typer.Option(help="Calls before, not counted; the first is the first-image time.")] = 1,
    pairs: Annotated[int, typer.Option(help="Prompt-and-seed pairs for the distance; 0 leaves it out.")] = 8,
    device: arg.Device = None,
    dtype: arg.Dtype = None,
    isolate: Annotated[bool, typer.Option("--isolate", help="Each configuration in a process of its own.")] = False,
    trace: Annotated[
        bool,
        typer.Option("--trace", help="Also write one step's kernel table and Chrome trace, and the GPU's waits."),
    ] = False,
    decode: Annotated[bool, typer.Option("--decode/--no-decode", help="Leave the VAE out of the calls.")] = True,
    out: Out = Path("bench"),
    as_json: arg.Json = False,
    show_list: Annotated[bool, typer.Option("--list", help="List configurations and suites, and stop.")] = False,
) -> None:
    """Measure configurations on one model: A, B, C, A, B, C ..., warm-up excluded, first image reported apart."""
    if context.invoked_subcommand is not None:
        return
    if show_list:
        _print_list()
        return
    place, loaded = arg.device_and_dtype(device, dtype)
    height, width = arg.height_and_width(size)
    if suite is not None:
        changes = {
            "batches": tuple(batch) or None,
            "height": height,
            "width": width,
            "steps": steps,
            "rounds": rounds,
            "model": model or (f"{ARCHITECTURE}{arch}" if arch else None),
        }
        given = {key: value for key, value in changes.items() if value is not None}
        given |= {"warmup": warmup, "pairs": pairs, "device": place, "isolate": isolate}
        chosen = [found for found in read_suite(suite).sections if section in (None, found.name)]
        if not chosen:
            raise refuse(f"--suite {suite}", f"no section {section!r}", "one of the suite's", "leave --section out")
        only = arg.split_names(configs)
        there = {case.name for found in chosen for case in found.cases}
        beside = find_cases([name for name in only if name not in there], cases)
        jobs: list[tuple[Job, Section | None]] = [
            (job, found) for found in chosen if (job := _section_job(found, given, only, beside)) is not None
        ]
    else:
        job = Job(
            model=arg.model_name(model, arch, "diffusers-turbo bench"),
            task=task,
            cases=find_cases(arg.split_names(configs) or DEFAULT_CONFIGS, cases),
            batches=tuple(batch) or (1,),
            height=height,
            width=width,
            steps=50 if steps is None else steps,
            guidance_scale=guidance,
            scheduler=scheduler,
            prompt=" ".join(prompt),
            seed=seed,
            rounds=10 if rounds is None else rounds,
            warmup=warmup,
            pairs=pairs,
            device=place,
            dtype=loaded,
            isolate=isolate,
            decode=decode,
        )
        jobs = [(job, None)]
    _run_all(jobs, out, baseline, trace, as_json)


@app.command()
def attention(
    tokens: Annotated[list[int], typer.Option(help="Numbers of tokens: --tokens 256 1024 4096")] = list(TOKENS),  # noqa: B006
    backends: Annotated[list[str], typer.Option(help="Backends by name.")] = list(BACKENDS),  # noqa: B006
    batch: Annotated[int, typer.Option("--size-of-batch", help="2 is one picture with guidance.")] = 2,
    rounds: Rounds = None,
    device: arg.Device = None,
    dtype: arg.Dtype = None,
    out: Out = Path("bench-attention"),
    as_json: arg.Json = False,
) -> None:
    """Measure one attention call by backend and number of tokens: microseconds and peak bytes."""
    place, loaded = arg.device_and_dtype(device, dtype)
    require_device(place)
    names = arg.split_names(backends)
    if unknown := [name for name in names if name not in BACKENDS]:
        raise refuse("--backends", ", ".join(unknown), f"names among {', '.join(BACKENDS)}", "correct them")
    if (rounds is not None and rounds < 1) or batch < 1 or min(tokens) < 1:
        raise refuse("bench attention", "a number below 1", "positive rounds, batch and tokens", "correct it")
    environment = read_environment(place)
    points: list[Point] = []
    total = len(tokens) * len(names)
    with progress_bar() as tell:
        tell("attention", 0, total)
        for point in measure_attention(
            place, loaded, tokens=sorted(tokens), batch=batch, rounds=rounds or 10, backends=names
        ):
            points.append(point)
            tell(f"{point.tokens} tokens", len(points), total)
            data = {"environment": environment, "dtype": loaded, "batch": batch, "points": to_plain(points)}
            write_whole(out / "attention.json", dumps(data), "the results")
    if any(point.microseconds for point in points):
        title = f"{environment['device_name']}, {loaded}, [B, H, N, D] = [{batch}, 8, N, 40]"
        try:
            plot_attention(points, out / "attention.png", device=title)
        except MissingPackageError as error:
            notices.print(f"no plot: {error}", highlight=False, markup=False)
    if as_json:
        results.print_json(dumps(data))
        return
    for point in points:
        spent = (
            point.reason if point.microseconds is None else f"{point.microseconds:12.0f} us {point.peak_bytes:14,} B"
        )
        results.print(f"{point.tokens:6} {point.backend:15} {spent}", highlight=False, markup=False)
    results.print(f"files in {out}", highlight=False, markup=False)


def _section_job(
    section: Section, changes: Mapping[str, object], only: list[str], beside: Sequence[Case]
) -> Job | None:
    """The run of a suite's section with what the user asked for otherwise; `beside` are cases of no section."""
    chosen = (*(case for case in section.cases if not only or case.name in only), *beside)
    if not chosen:
        return None
    return replace(section.job(chosen), **changes)  # type: ignore[arg-type]


def _run_all(
    jobs: list[tuple[Job, Section | None]], out: Path, baseline: str | None, trace: bool, as_json: bool
) -> None:
    measured: list[Results] = []
    for job, section in jobs:
        folder = out if section is None else out / section.name
        compared = baseline or (section.baseline if section is not None else "")
        if compared not in [case.name for case in job.cases]:
            if baseline:
                needed = f"one of {', '.join(case.name for case in job.cases)}"
                raise refuse(f"--baseline {baseline}", "no such configuration in this run", needed, "correct it")
            compared = ""
        with progress_bar() as tell:
            found = run(job, folder / "results.json", baseline=compared, progress=tell, trace=trace)
        measured.append(found)
        beside = [] if section is None else published_lines(section, found)
        _write_files(found, folder, beside)
        if not as_json:
            results.print(rich_table(found))
            for line in (*beside, *found.notes, f"files in {folder}"):
                results.print(line, highlight=False, markup=False)
        if found.finished is None:
            notices.print("interrupted; the same command goes on from here", highlight=False)
            raise typer.Exit(INTERRUPTED)
    if as_json:
        whole = [json.loads(found.to_json()) for found in measured]
        results.print_json(json.dumps(whole[0] if len(whole) == 1 else whole))
    if not any(row.measured for found in measured for row in found.rows):
        raise typer.Exit(NOTHING_MEASURED)


def _write_files(found: Results, folder: Path, beside: list[str]) -> None:
    write_whole(folder / "results.csv", csv_text(found), "the CSV table")
    text = markdown(found) + ("\n" + "\n".join(beside) + "\n" if beside else "")
    write_whole(folder / "results.md", text, "the Markdown table")
    try:
        if any(row.measured for row in found.rows):
            plot_bars(found, folder / "times.png")
        if any(row.measured and (row.peak_allocated_bytes or row.peak_host_bytes) for row in found.rows):
            plot_memory(found, folder / "memory.png")
    except MissingPackageError as error:  # the numbers stand without the pictures
        notices.print(f"no plots: {error}", highlight=False, markup=False)


def _print_list() -> None:
    lines = ["configurations:"]
    lines += [f"  {case.name:24} {case.description}" for case in builtin_cases().values()]
    lines.append("suites:")
    for name in suites():
        suite = read_suite(name)
        lines.append(f"  {name:24} {suite.title} ({', '.join(section.name for section in suite.sections)})")
    results.print("\n".join(lines), highlight=False, markup=False)
