"""`generate`: pictures from a prompt, with the preset that suits this machine."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ..bench.cases import Case
from ..bench.job import Job
from ..bench.loading import load_for
from ..bench.reading import refuse
from ..bench.running import size_of
from ..bench.tasks import size_inputs
from ..entry import auto_optimize
from ..facts.probing import require_device
from . import arguments as arg
from .output import notices, progress_bar, results


def generate(
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    model: arg.Model = None,
    arch: arg.Arch = None,
    out: Annotated[Path, typer.Option(help="PNG to write; more than one picture get numbers.")] = Path("picture.png"),
    images: Annotated[int, typer.Option(help="How many pictures, one seed after the other.")] = 1,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 30,
    seed: Annotated[int, typer.Option(help="Seed of the first picture.")] = 0,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale. Default: the pipeline's own.")] = None,
    size: arg.Size = None,
    scheduler: arg.Scheduler = None,
    device: arg.Device = None,
    dtype: arg.Dtype = None,
    vram: arg.Vram = None,
    exact: arg.Exact = False,
    tier: arg.Tier = None,
    cache_dir: arg.CacheDir = None,
    plain: Annotated[bool, typer.Option("--plain", help="As diffusers makes it: switch nothing on.")] = False,
    explain: Annotated[bool, typer.Option("--explain", help="Also say what was switched on, and why.")] = False,
    as_json: arg.Json = False,
) -> None:
    """Make pictures with the preset that suits this machine."""
    if images < 1:
        raise refuse(f"--images {images}", str(images), "1 or more", "correct it")
    height, width = arg.height_and_width(size)
    place, loaded = arg.device_and_dtype(device, dtype)
    name = arg.model_name(model, arch, "diffusers-turbo generate")
    job = Job(
        model=name,
        cases=(Case(name="generate"),),
        height=height,
        width=width,
        steps=steps,
        scheduler=scheduler,
        guidance_scale=guidance,
        device=place,
        dtype=loaded,
    )
    _require_writable(out)
    require_device(place)
    with notices.status(f"loading {name}"):
        # a plan brings it to the device, whole or by parts
        pipe = load_for(job if plain else replace(job, device="cpu"), job.cases[0])
        size_of(pipe, job)
        if not plain:
            wanted: dict[str, Any] = {"vram_budget": vram, "exact": exact, "tier": tier, "images": images}
            wanted |= {"height": height, "width": width, "steps": steps, "cache_dir": cache_dir}
            auto_optimize(pipe, device=place, **wanted)
    written, seconds = [], []
    with progress_bar() as tell:
        for number in range(images):
            start = time.perf_counter()
            picture = _draw(
                pipe, job, prompt, seed + number, lambda step, n=number: tell(prompt, n * steps + step, images * steps)
            )
            seconds.append(time.perf_counter() - start)
            written.append(out if images == 1 else out.with_name(f"{out.stem}-{number + 1}{out.suffix}"))
            picture.save(written[-1])
    report = None if plain else pipe.turbo_report()
    if as_json:
        import json

        told = None if report is None else json.loads(report.to_json())
        results.print_json(json.dumps({"files": list(map(str, written)), "seconds": seconds, "report": told}))
        return
    if explain and report is not None:
        results.print(str(report), highlight=False, markup=False)
    for path, spent in zip(written, seconds, strict=True):
        results.print(f"{path}  {spent:.2f} s", highlight=False, markup=False)


def _draw(pipe: Any, job: Job, prompt: str, seed: int, tell: Any) -> Any:
    def after_step(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        tell(step + 1)
        return tensors

    guidance = {} if job.guidance_scale is None else {"guidance_scale": job.guidance_scale}
    return pipe(
        prompt,
        num_inference_steps=job.steps,
        generator=torch.Generator().manual_seed(seed),
        callback_on_step_end=after_step,
        **guidance,
        **size_inputs(pipe, job.height, job.width),
    ).images[0]


def _require_writable(path: Path) -> None:
    """Find out before the work that its result can be kept."""
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise refuse(f"--out {path}", f"the ending {path.suffix!r}", ".png, .jpg or .webp", "choose another name")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        existed = path.exists()
        path.open("ab").close()
        if not existed:
            path.unlink()
    except OSError as error:
        found = f"{type(error).__name__}: {error.strerror or error}"
        raise refuse(f"writing {path}", found, "a folder that can be written to", "choose another --out") from error
