"""Five sizes in turn on compiled pipelines: what they cost to compile, and what code for all sizes costs a picture.

    python docs/benchmarks/sizes.py MODEL RESULTS.json [--sizes 512x512 512x768 ...] [--steps 50] [--scheduler ddim]
                                    [--rounds 7] [--seconds N] [--only dynamic static instant] [--without ACTION ...]

MODEL is a folder or "arch:sd15", a size is WIDTHxHEIGHT. One process holds up to three pipelines: "dynamic" is the
compiled tier as the planner has it, whose second size is compiled for all sizes; "static" is the same with
`dynamic=False`, a compilation of its own for each size; "instant" is the tier that compiles nothing. At each size in
turn every pipeline draws two pictures: the first compiles, the second records the decoder's graph, as graphs are
recorded at second sight. Then come rounds, in which sizes and pipelines take turns, one call each. No round begins
after --seconds.

First pictures are seconds of a process, not of a pipeline: the first one of all also loads the libraries, and what the
pipelines have in common, such as the first size's code, is in Inductor's cache once "dynamic" has made it.

To fill Inductor's cache for a later run: `--rounds 0 --steps 2 --only static --sizes 640x640`, a process for each size
if need be. What "dynamic" compiles depends on the order of the sizes: `--only dynamic` needs all of them. On the CPU
there are neither graphs nor an instant tier. `--without enable_shared_guidance`: leave a switch out, for a model that
refuses it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from diffusers_turbo import DeviceFacts, plan, probe
from diffusers_turbo.actions.ahead import graphs_of
from diffusers_turbo.actions.calls import COMPILED, calls_from
from diffusers_turbo.bench.cases import Case, Switch
from diffusers_turbo.bench.clock import timed
from diffusers_turbo.bench.environment import read_environment
from diffusers_turbo.bench.job import Job
from diffusers_turbo.bench.loading import apply_case, load_for
from diffusers_turbo.compilation.call import WatchedCall
from diffusers_turbo.compilation.counts import Counts
from diffusers_turbo.planning.options import CUDAGraphs

PROMPT = "A photo"
NAMES = ("dynamic", "static", "instant")
SIZES = ("512x512", "512x768", "768x512", "640x640", "768x768")
MOST = CUDAGraphs().max_graphs
"""Sizes whose graphs are kept, one a size for each network; the instant tier takes this default, too."""
ONLY_CUDA = ("enable_sync_free_loop", "enable_cuda_graphs")
VARIANTS = 64
"""Codes that Dynamo may keep of one function. Both compiled pipelines run the same `forward` of the same class: its
five static codes and two dynamic ones are near the default of 8, beyond which calls run eagerly."""


@dataclass(frozen=True)
class Size:
    """Pixels of a picture."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


def size(text: str) -> Size:
    """Read "WIDTHxHEIGHT"."""
    width, height = text.split("x")
    return Size(int(width), int(height))


def make_case(name: str, pipe: Any, job: Job, without: set[str]) -> Case:
    """Return a pipeline's switches: what the planner takes for the compiled tier without some, or the instant tier."""
    if name == "instant":
        return Case(name=name, auto={"tier": "instant"})
    cuda = job.device == "cuda"
    facts = probe("cuda") if cuda else DeviceFacts.card("H100")
    steps = plan(pipe, facts, tier="compiled", height=job.height, width=job.width).steps
    unknown = without - {step.action for step in steps}
    if unknown:
        raise SystemExit(f"not a switch of the compiled tier: {', '.join(sorted(unknown))}")
    left_out = without | (set() if cuda else set(ONLY_CUDA))
    fixed = {"dynamic": False} if name == "static" else {}
    return Case(
        name=name,
        switches=tuple(
            Switch(
                action=step.action,
                options={**step.options, **(fixed if step.action.startswith("compile_") else {})},
            )
            for step in steps
            if step.action not in left_out
        ),
    )


class Contender:
    """A pipeline, and what was found out about it."""

    def __init__(self, name: str, job: Job, without: set[str]) -> None:
        """Load the pipeline and throw its switches."""
        pipe = load_for(job, Case(name=name))
        self.case = make_case(name, pipe, job, without)
        self.pipe = apply_case(pipe, self.case, job)
        self.device, self.steps = torch.device(job.device), job.steps
        self.first_s: dict[str, list[float]] = {}
        self.compilations: dict[str, dict[str, dict[str, int]]] = {}
        self.seconds: dict[str, list[float]] = {}

    def draw(self, size: Size) -> float:
        """Draw one picture and return its seconds."""

        def call() -> Any:
            return self.pipe(
                PROMPT,
                height=size.height,
                width=size.width,
                num_inference_steps=self.steps,
                generator=torch.Generator().manual_seed(1),
                output_type="pt",
            )

        return timed(call, self.device)[0]

    def draw_first(self, size: Size) -> None:
        """Draw the first two pictures of a size, and count what was compiled for them."""
        before = self.counts()
        self.first_s[str(size)] = [self.draw(size), self.draw(size)]
        self.compilations[str(size)] = {
            part: asdict(counts.since(before[part])) for part, counts in self.counts().items()
        }

    def draw_again(self, size: Size) -> None:
        """Draw a picture that counts."""
        self.seconds.setdefault(str(size), []).append(self.draw(size))

    def calls(self) -> dict[str, Any]:
        """Return what stands in place of the calls of the UNet and of the VAE, whose encoder has nothing to do."""
        parts = {"unet": self.pipe.unet, "vae": self.pipe.vae.decoder}
        return {name: vars(part).get(COMPILED) for name, part in parts.items()}

    def counts(self) -> dict[str, Counts]:
        """Return what the compiler did for the UNet and for the VAE so far.

        Raises:
            RuntimeError: it gave up, and what would be measured is the eager call.
        """
        found = {}
        for part, call in self.calls().items():
            watched = next((each for each in calls_from(call) if isinstance(each, WatchedCall)), None)
            if watched is not None and (watched.failure or watched.counts.limits):
                raise RuntimeError(f"the {part} runs eagerly: {watched.failure or 'it was compiled too often'}")
            found[part] = watched.counts if watched is not None else Counts()
        return found

    def as_dict(self) -> dict[str, Any]:
        """Return all of it as plain data."""
        graphs = {part: graphs_of(call) for part, call in self.calls().items()}
        return {
            "first_two_s": self.first_s,
            "compilations": self.compilations,
            "compiled_in_all": {part: counts.compiled for part, counts in self.counts().items()},
            "graphs": {part: found.told() for part, found in graphs.items() if found is not None},
            "seconds": self.seconds,
            "median_ms": {size: 1000 * statistics.median(seconds) for size, seconds in self.seconds.items()},
        }


def ratios(pipelines: dict[str, Any]) -> dict[str, float]:
    """Return dynamic by static, of the medians of each size that both have drawn."""
    medians = [pipelines.get(name, {}).get("median_ms", {}) for name in ("dynamic", "static")]
    return {size: dynamic / medians[1][size] for size, dynamic in medians[0].items() if size in medians[1]}


def print_table(sizes: list[Size], results: dict[str, Any]) -> None:
    """Print a row a size: of each pipeline its milliseconds and the compilations of the UNet and of the VAE."""
    pipelines = results["pipelines"]
    print(f"{'':10}" + "".join(f"{name:>30}" for name in pipelines) + "   dynamic / static")
    for size in map(str, sizes):
        cells = []
        for found in pipelines.values():
            compiled = "+".join(str(counts["compiled"]) for counts in found["compilations"][size].values())
            first, median = found["first_two_s"][size][0], found["median_ms"].get(size, float("nan"))
            cells.append(f"{median:9.1f} ms {first:7.1f} s first {compiled}".rjust(30))
        print(f"{size:10}{''.join(cells)}   {results['dynamic_by_static'].get(size, float('nan')):.3f}")
    for name, found in pipelines.items():
        parts = " and ".join(f"{count} of the {part}" for part, count in found["compiled_in_all"].items())
        print(f"{name}: compilations in all: {parts}; graphs: {found['graphs'] or 'none'}")


def main() -> None:
    """Measure, write the JSON after each size and each round, and print a table."""
    start = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("results", type=Path)
    parser.add_argument("--sizes", nargs="+", type=size, default=[size(text) for text in SIZES])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--scheduler")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no round after this long")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES), help="pipelines to hold")
    parser.add_argument("--without", nargs="+", default=[], metavar="ACTION", help="switches to leave out")
    given = parser.parse_args()
    if len(given.sizes) > MOST:
        parser.error(f"at most {MOST} sizes: that many graphs are kept")
    cuda = torch.cuda.is_available()
    names = [name for name in NAMES if name in given.only and (cuda or name != "instant")]
    job = Job(
        model=given.model,
        cases=tuple(Case(name=name) for name in names),
        height=max(size.height for size in given.sizes),
        width=max(size.width for size in given.sizes),
        steps=given.steps,
        scheduler=given.scheduler,
        device="cuda" if cuda else "cpu",
        dtype="float16" if cuda else "float32",
    )
    results: dict[str, Any] = {
        "model": given.model,
        "steps": given.steps,
        "scheduler": given.scheduler,
        "sizes": [str(size) for size in given.sizes],
        "without": given.without,
        "environment": read_environment(job.device, measure=False),
    }

    contenders = {name: Contender(name, job, set(given.without)) for name in names}
    results["switches"] = {name: [each.action for each in made.case.switches] for name, made in contenders.items()}

    def save() -> None:
        results["pipelines"] = {name: contender.as_dict() for name, contender in contenders.items()}
        results["dynamic_by_static"] = ratios(results["pipelines"])
        given.results.write_text(json.dumps(results, indent=1) + "\n")

    with torch._dynamo.config.patch(recompile_limit=VARIANTS):
        for each in given.sizes:
            for name, contender in contenders.items():
                contender.draw_first(each)
                told = {part: counts["compiled"] for part, counts in contender.compilations[str(each)].items()}
                print(f"{each} {name}: {contender.first_s[str(each)][0]:.1f} s, compilations {told}", flush=True)
            save()
        for number in range(given.rounds):
            if time.monotonic() - start > given.seconds:
                print(f"{number} rounds of {given.rounds}: the time is up")
                break
            for each in given.sizes:
                for contender in contenders.values():
                    contender.draw_again(each)
            save()
    print_table(given.sizes, results)


if __name__ == "__main__":
    main()
