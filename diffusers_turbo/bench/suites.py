"""Suites: published benchmarks, as what to run here and the numbers that were published, each with its link.

A suite is a TOML file in `suites/`. Its sections are runs of one model at one size; their cases come from the suite
itself or from the built-in ones. Published numbers stand there as they were printed, and are turned into one call's
seconds and into bytes when read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, cast

from .cases import LOADING_DTYPES, Case, builtin_cases, parse_cases, pick_cases
from .job import ARCHITECTURE, Job
from .reading import check_keys, check_table, did_you_mean, read_toml, refuse

FOLDER = "suites"

# How a published number is printed -> (field of Published, factor). A number that covers several calls is divided.
_MEASURES: dict[str, tuple[str, float]] = {
    "seconds": ("seconds", 1),
    "iterations_per_s": ("iterations_per_s", 1),
    "peak_gib": ("peak_bytes", 1024**3),
    "peak_gb": ("peak_bytes", 1000**3),
}


_OF_A_JOB = {field.name for field in fields(Job)}


@dataclass(frozen=True, kw_only=True)
class Published:
    """What a source printed for one case at one batch size on one device.

    Attributes:
        case, batch, device: what ran, and where; the device as the source names it.
        seconds: one call, i.e. one batch of pictures.
        iterations_per_s: denoising steps a second.
        peak_bytes: of device memory.
        calls: how many calls the printed seconds covered.
        source: a link.
        note: how to read the number, empty where it needs no words.
    """

    case: str
    batch: int
    device: str
    seconds: float | None = None
    iterations_per_s: float | None = None
    peak_bytes: int | None = None
    calls: int = 1
    source: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Section:
    """One run of a suite: a model at a size, the cases side by side, and what was published of them.

    Attributes:
        name, title: short for the command line, long for headings.
        arch: the architecture, such as "sd15", for runs without weights.
        task: "txt2img", "img2img" or "inpaint".
        height, width: pixels.
        steps, scheduler, guidance_scale, prompt, seed: of each call; None is the pipeline's own.
        batches: pictures per call.
        dtype: what the pipeline is loaded in where a case names none.
        cases: side by side.
        baseline: name of the case that the others are compared with.
        published: what the source printed.
        note: how the protocol here differs from the source's, and what the source leaves open.
    """

    name: str
    title: str
    arch: str
    task: str = "txt2img"
    height: int
    width: int
    steps: int
    scheduler: str | None = None
    guidance_scale: float | None = None
    prompt: str
    seed: int = 1
    batches: tuple[int, ...] = (1,)
    dtype: str = "float32"
    cases: tuple[Case, ...]
    baseline: str
    published: tuple[Published, ...] = ()
    note: str = ""

    def job(self, cases: tuple[Case, ...] | None = None) -> Job:
        """Return the run of this section, on random weights; of some of its cases only, where they are given."""
        own = {field.name: getattr(self, field.name) for field in fields(self) if field.name in _OF_A_JOB}
        return Job(**{**own, "model": f"{ARCHITECTURE}{self.arch}", "cases": cases or self.cases})


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A published benchmark: its name, title, link and sections."""

    name: str
    title: str
    source: str
    sections: tuple[Section, ...]


def suites() -> list[str]:
    """Return the names of the built-in suites.

    >>> suites()
    ['diffusers-docs', 'peers', 'photoroom', 'pytorch-blog', 'tiers']
    """
    return sorted(_built_in())


def read_suite(name: str | Path) -> Suite:
    """Return a built-in suite by its name, or the suite of a TOML file by its path.

    Raises:
        InvalidOptionError: no such suite or file, or a fault in it; the text names file, section and key.
    """
    if isinstance(name, Path) or name.endswith(".toml"):
        return _parse_suite(Path(name))
    built_in = _built_in()
    if name not in built_in:
        found = f"no suite {name!r}{did_you_mean(name, built_in)}"
        needed = f"one of {', '.join(sorted(built_in))}, or the path of a .toml file"
        raise refuse("read_suite()", found, needed, "correct the name")
    return _parse_suite(built_in[name])


@cache
def _built_in() -> dict[str, Traversable]:
    found = (files(__package__) / FOLDER).iterdir()
    return {file.name.removesuffix(".toml"): file for file in found if file.name.endswith(".toml")}


def _parse_suite(file: Traversable | Path) -> Suite:
    where = str(file)
    table = read_toml(file)
    check_keys(table, ("title", "source", "cases", "sections"), where, required=("title", "source", "sections"))
    _check_link(table["source"], where)
    own = parse_cases(check_table(table.get("cases", {}), f"{where}, [cases]"), where)
    known = builtin_cases() | own
    sections = check_table(table["sections"], f"{where}, [sections]")
    return Suite(
        name=file.name.removesuffix(".toml"),
        title=table["title"],
        source=table["source"],
        sections=tuple(
            _parse_section(name, section, known, table["source"], f"{where}, [sections.{name}]")
            for name, section in sections.items()
        ),
    )


def _parse_section(name: str, value: object, known: Mapping[str, Case], source: str, where: str) -> Section:
    table = check_table(value, where)
    keys = [part.name for part in fields(Section) if part.name != "name"]
    check_keys(table, keys, where, required=("title", "arch", "height", "width", "steps", "prompt", "cases"))
    for key, expected in _TYPES.items():
        if key in table and (not isinstance(table[key], expected) or isinstance(table[key], bool)):
            kind = expected.__name__ if isinstance(expected, type) else "number"
            raise refuse(where, f"{key} = {table[key]!r}", f"{key} as {kind}", f"correct {key}")
    if table.get("dtype", "float32") not in LOADING_DTYPES:
        raise refuse(where, f"dtype = {table['dtype']!r}", f"one of {', '.join(LOADING_DTYPES)}", "correct dtype")
    batches = tuple(table.get("batches", (1,)))
    if not batches or not all(type(batch) is int and batch > 0 for batch in batches):
        raise refuse(where, f"batches = {list(batches)}", "positive numbers", "correct batches")
    cases = pick_cases(table["cases"], known, where)
    names = [case.name for case in cases]
    baseline = table.get("baseline", next(iter(names), None))
    if baseline not in names:
        found = f"baseline = {baseline!r}{did_you_mean(str(baseline), names)}"
        raise refuse(where, found, f"one of the section's cases: {', '.join(names)}", "correct the name")
    published = [
        row
        for number, entry in enumerate(table.get("published", []), start=1)
        for row in _parse_published(entry, names, batches, source, f"{where}, published {number}")
    ]
    given = {key: item for key, item in table.items() if key not in ("cases", "published", "batches", "baseline")}
    return Section(
        name=name, cases=cases, batches=batches, baseline=cast(str, baseline), published=tuple(published), **given
    )


_TYPES: dict[str, Any] = {
    **dict.fromkeys(("title", "arch", "task", "scheduler", "prompt", "dtype", "baseline", "note"), str),
    **dict.fromkeys(("height", "width", "steps", "seed"), int),
    **dict.fromkeys(("cases", "batches", "published"), list),
    "guidance_scale": (int, float),
}


def _parse_published(
    value: object, cases: list[str], batches: tuple[int, ...], suite_source: str, where: str
) -> list[Published]:
    """Make one Published a case out of a table such as {device="T4", batch=1, seconds={naive=29.8, xformers=16.8}}."""
    table = check_table(value, where)
    check_keys(table, ("device", "batch", "calls", "source", "note", *_MEASURES), where, required=("device",))
    batch, calls = table.get("batch", 1), table.get("calls", 1)
    if batch not in batches:
        raise refuse(where, f"batch = {batch!r}", f"one of the section's batches: {batches}", "correct batch")
    if type(calls) is not int or calls < 1:
        raise refuse(where, f"calls = {calls!r}", "a positive number of calls", "correct calls")
    source = table.get("source", suite_source)
    _check_link(source, where)
    measured: dict[str, dict[str, Any]] = {}
    for key, (field_name, factor) in _MEASURES.items():
        for case, number in check_table(table.get(key, {}), f"{where}, {key}").items():
            if case not in cases:
                found = f"{key} of {case!r}, which is no case of this section{did_you_mean(case, cases)}"
                raise refuse(where, found, f"one of {', '.join(cases)}", "correct the name")
            if isinstance(number, bool) or not isinstance(number, (int, float)) or number <= 0:
                raise refuse(where, f"{key} of {case} = {number!r}", "a positive number", "correct it")
            one_call = number / calls if field_name == "seconds" else number * factor
            measured.setdefault(case, {})[field_name] = round(one_call) if field_name == "peak_bytes" else one_call
    if not measured:
        raise refuse(where, "no number", f"at least one of {', '.join(_MEASURES)}", "add one, or remove the table")
    rest: dict[str, Any] = {"batch": batch, "calls": calls, "source": source, "note": table.get("note", "")}
    return [Published(case=case, device=table["device"], **rest, **numbers) for case, numbers in measured.items()]


def _check_link(value: object, where: str) -> None:
    if not isinstance(value, str) or not value.startswith("https://"):
        raise refuse(where, f"source = {value!r}", "a link that starts with https://", "name where it was published")
