"""`probe` and `plan`: what is here, and what would be done, with nothing done."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from ..facts.device import DeviceFacts
from ..facts.device import probe as probe_device
from ..planning.memory import estimate_memory
from ..planning.plan import Plan
from ..planning.planner import plan as make_plan
from ..planning.timing import STEPS
from ..planning.units import gib
from ..prediction.predict import Predictor
from ..prediction.result import MemoryPrediction
from . import arguments as arg
from .output import results

Card = Annotated[str | None, typer.Option("--card", help='A known card instead of this machine, such as "RTX 3060".')]


def probe(device: arg.Device = None, card: Card = None, as_json: arg.Json = False) -> None:
    """Say what this machine has: device, memory, formats, kernels that really run, versions."""
    facts = _facts(device, card)
    if as_json:
        results.print_json(facts.to_json())
        return
    sm = f", SM {facts.sm[0]}.{facts.sm[1]}" if facts.sm else ""
    lines = [f"{facts.name} ({facts.device}{sm})"]
    lines.append(
        f"  memory: {gib(facts.free_bytes)} free of {gib(facts.total_bytes)}; host {gib(facts.host_ram_bytes)}"
    )
    formats = [name for name in ("fp16", "bf16", "tf32", "fp8") if getattr(facts, name)]
    lines.append(f"  formats: {', '.join(['fp32', *formats])}")
    lines.extend(f"    not {name}: {reason}" for name, reason in facts.refusals.items())
    for title, table in (("SDPA", facts.sdpa_kernels), ("xFormers", facts.xformers_kernels)):
        runs = [f"{name} ({', '.join(dtypes)})" for name, dtypes in table.items() if dtypes]
        lines.append(f"  {title} kernels: {'; '.join(runs) or 'none'}")
    lines.append(f"  Triton: {'yes' if facts.triton else 'no'}; C++ compiler: {facts.cxx_compiler or 'none'}")
    lines.append(f"  {', '.join(f'{name} {version}' for name, version in facts.versions.items())}")
    lines.extend(f"  {note}" for note in facts.notes)
    results.print("\n".join(lines), highlight=False, markup=False)


def plan(
    model: arg.Model = None,
    arch: arg.Arch = None,
    card: Card = None,
    device: arg.Device = None,
    dtype: arg.Dtype = None,
    cast: Annotated[
        str, typer.Option(help='What the plan may cast weights to: "keep", "auto", "float16" ...')
    ] = "keep",
    size: arg.Size = None,
    batch: Annotated[int, typer.Option(help="Pictures per call.")] = 1,
    steps: Annotated[int, typer.Option(help="Denoising steps of a call; decides which offload costs least.")] = STEPS,
    images: Annotated[
        int | None, typer.Option(help="How many pictures in all; decides whether compiling pays.")
    ] = None,
    vram: arg.Vram = None,
    exact: arg.Exact = False,
    tier: arg.Tier = None,
    cache_dir: arg.CacheDir = None,
    as_json: arg.Json = False,
) -> None:
    """Say what would be switched on for a model, here or on a card you do not have, why, and the predicted peaks."""
    name = arg.model_name(model, arch, "diffusers-turbo plan")
    height, width = arg.height_and_width(size)
    facts = _facts(device, card)
    _, loaded = arg.device_and_dtype(facts.device, dtype)
    pipe = _weightless(name, loaded)
    # the allocator's rules that a prediction follows are CUDA's
    predictor = Predictor(pipe, device=facts) if facts.device_type == "cuda" else None
    made = make_plan(
        pipe,
        facts,
        height=height,
        width=width,
        batch_size=batch,
        steps=steps,
        images=images,
        vram_budget=vram,
        dtype=cast,
        exact=exact,
        tier=tier,
        cache_dir=cache_dir,
        estimates=predictor.estimate if predictor is not None else estimate_memory,
    )
    peaks = _peaks(predictor, made) if predictor is not None else None
    if as_json:
        told = made.as_dict() | ({"predicted": peaks.as_dict()} if peaks is not None else {})
        results.print_json(json.dumps(told))
        return
    results.print(made.explain(), highlight=False, markup=False)
    if peaks is not None:
        results.print(peaks.explain(), highlight=False, markup=False)


def _peaks(predictor: Predictor, made: Plan) -> MemoryPrediction:
    """What a plan's steps need."""
    options = [step.typed_options() for step in made.steps]
    request = made.request
    return predictor(
        height=request["height"], width=request["width"], batch_size=request["batch_size"], options=options
    )


def _facts(device: str | None, card: str | None) -> DeviceFacts:
    if card is not None:
        return DeviceFacts.card(card)
    if device is not None:
        from ..facts.probing import require_device

        require_device(device)
    return probe_device(device)


def _weightless(name: str, dtype: str) -> Any:
    """An architecture needs no weights to be planned for; a model is read into host memory."""
    import torch

    from ..bench.job import ARCHITECTURE
    from ..bench.loading import load_model

    if name.startswith(ARCHITECTURE):
        from ..bench.architectures import build

        return build(name.removeprefix(ARCHITECTURE), dtype=getattr(torch, dtype), device="meta")
    return load_model(name, dtype, "cpu")
