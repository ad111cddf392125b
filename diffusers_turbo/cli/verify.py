"""`verify`: the same latents through the reference and through a configuration; distances, a verdict, a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..bench.cases import Case, find_cases
from ..bench.job import Job
from ..bench.loading import apply_case, load_for
from ..bench.peers import PEERS
from ..bench.reading import refuse
from ..bench.running import size_of
from ..verification.check import Yardstick, promised
from ..verification.inputs import STEPS, make_inputs
from ..verification.sheet import save_verification
from . import arguments as arg
from .output import notices, results

BROKEN = 1


def verify(
    model: arg.Model = None,
    arch: arg.Arch = None,
    configs: Annotated[list[str], typer.Option(help="The configuration to check.")] = ["auto"],  # noqa: B006
    cases: arg.ExtraCases = None,
    prompt: Annotated[list[str], typer.Option(help="What to draw; repeat it for more.")] = [],  # noqa: B006
    pairs: Annotated[int | None, typer.Option(help="Prompt-and-seed pairs. Default: one a prompt, else 8.")] = None,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = STEPS,
    size: arg.Size = None,
    scheduler: arg.Scheduler = None,
    batch: Annotated[int, typer.Option(help="Pictures per call.")] = 1,
    device: arg.Device = None,
    dtype: arg.Dtype = None,
    out: Annotated[Path | None, typer.Option(help="PNG: reference, pictures and their difference, amplified.")] = None,
    as_json: arg.Json = False,
) -> None:
    """Check that a configuration's pictures are still right: exact, close or different, against naive fp32."""
    case = _one_case(configs, cases)
    place, loaded = arg.device_and_dtype(device, dtype)
    height, width = arg.height_and_width(size)
    name = arg.model_name(model, arch, "diffusers-turbo verify")
    job = Job(
        model=name,
        cases=(case,),
        height=height,
        width=width,
        steps=steps,
        scheduler=scheduler,
        device=place,
        dtype=loaded,
    )
    inputs = make_inputs(tuple(prompt), pairs, steps=steps, height=height, width=width, batch_size=batch)
    with notices.status("drawing the reference"):
        pipe = load_for(job, case)
        size_of(pipe, job)
        yardstick = Yardstick(pipe, inputs)  # of a copy: the pipeline is still untouched
    with notices.status(f"drawing with {case.name}"):
        pipe = apply_case(pipe, case, job)
        lossy_peer = case.peer is not None and PEERS[case.peer].lossy_reason is not None
        promise = "close" if lossy_peer else promised(pipe)
        found = yardstick.measure(pipe, promise, case.autocast)
    if out is not None:
        save_verification(found, out)
    if as_json:
        results.print_json(found.to_json())
    else:
        results.print(found.explain(), highlight=False, markup=False)
        if out is not None:
            results.print(f"  side by side: {out}", highlight=False, markup=False)
    if not found.kept:
        raise typer.Exit(BROKEN)


def _one_case(names: list[str], file: str | None) -> Case:
    split = arg.split_names(names)
    if len(split) != 1:
        found, needed = f"{len(split)} configurations", "one at a time"
        raise refuse("diffusers-turbo verify", found, needed, "name one, such as --configs auto")
    (case,) = find_cases(split, file)
    return case
