"""Measure the peak memory of every stage over a grid of sizes, batches and switches, and predict it beside.

python docs/benchmarks/memory_grid.py docs/benchmarks/memory-grid-<gpu>.json [--seconds 460] [--only sdxl]

One process on one GPU. Cells are ordered so that a run cut short is still useful; what the file holds already is not
measured again. Predictions need no GPU and come last: `--predict-only` makes them from the file alone. `--tiny` tries
the script on a CPU, with thin networks and live bytes counted operator by operator in place of the allocator's peaks.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch

from diffusers_turbo import DeviceFacts, probe, turbo
from diffusers_turbo.actions.ledger import open_ledger
from diffusers_turbo.bench.architectures import assemble, find
from diffusers_turbo.bench.live_bytes import LiveBytes
from diffusers_turbo.bench.schedulers import set_scheduler
from diffusers_turbo.planning.options import make_options
from diffusers_turbo.planning.units import MIB
from diffusers_turbo.prediction.predict import Predictor
from diffusers_turbo.prediction.result import MemoryPrediction
from diffusers_turbo.prediction.workspaces import workspaces_of

STEPS = 3
STAGES = ("encode", "denoise", "decode")
PROMPT = "a photograph of an astronaut riding a horse"

Switches = tuple[tuple[str, dict[str, Any]], ...]

SDPA = ("enable_sdpa", {})
LAST = ("enable_channels_last", {})
MODEL = ("enable_model_cpu_offload", {})
SLICES = ("enable_vae_slicing", {})
GRAPHS = ("enable_cuda_graphs", {})
BLOCKS = ("enable_group_offload", {"num_blocks_per_group": 1})
STREAM = ("enable_group_offload", {"offload_type": "leaf_level", "use_stream": True})
SEQUENTIAL = ("enable_sequential_cpu_offload", {})


def tiles(side: int) -> tuple[str, dict[str, Any]]:
    """The switch for tiles of a side in pixels."""
    return "enable_vae_tiling", {"tile_size": side}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One measurement. `priority` 0 comes first."""

    priority: int
    architecture: str
    side: int
    batch_size: int
    switches: Switches
    dtype: str = "float16"

    @property
    def key(self) -> str:
        """Its name in the file."""
        called = "+".join(f"{action}({json.dumps(given)})" for action, given in self.switches)
        return f"{self.architecture} {self.dtype} {self.side} x{self.batch_size} {called}"

    @property
    def group(self) -> tuple[int, str, str]:
        """What cells share a pipeline, in the order in which they are measured."""
        return self.priority, self.architecture, self.dtype


def cells() -> list[Cell]:
    """Every cell, grouped by pipeline and the most telling ones first."""
    found: list[Cell] = []

    def add(priority: int, name: str, side: int, batch_size: int, *switches: Any, dtype: str = "float16") -> None:
        cell = Cell(
            priority=priority,
            architecture=name,
            side=side,
            batch_size=batch_size,
            switches=tuple(switches),
            dtype=dtype,
        )
        found.append(cell)

    for side, batch_size in ((512, 1), (512, 4), (512, 8), (1024, 1), (2048, 1)):
        add(0, "sd15", side, batch_size, SDPA)
    for switch in (MODEL, STREAM, GRAPHS, ("enable_naive_attention", {})):
        add(0, "sd15", 512, 1, *([] if "attention" in switch[0] else [SDPA]), switch)
    add(0, "sd15", 1024, 1, SDPA, LAST)
    for side, batch_size in ((1024, 1), (1024, 2), (768, 1)):
        add(0, "sdxl", side, batch_size, SDPA)
    for switch in (LAST, MODEL, tiles(512), STREAM, GRAPHS):
        add(0, "sdxl", 1024, 1, SDPA, switch)

    for side, batch_size in ((512, 2), (768, 1), (768, 2), (768, 4), (1024, 2), (1024, 4), (1536, 1)):
        add(1, "sd15", side, batch_size, SDPA)
    for switch in (LAST, BLOCKS, SEQUENTIAL, ("fuse_qkv_projections", {}), tiles(256)):
        add(1, "sd15", 512, 1, SDPA, switch)
    add(1, "sd15", 512, 1, SDPA, ("enable_group_offload", {"num_blocks_per_group": 2}))
    add(1, "sd15", 512, 1, SDPA, GRAPHS, ("enable_prompt_projections", {}))
    add(1, "sd15", 512, 1, ("enable_attention_slicing", {}))
    add(1, "sd15", 512, 1, ("enable_attention_slicing", {"max_bytes": 64 * MIB}))
    for switch in (SLICES, LAST, MODEL):
        add(1, "sd15", 512, 8, SDPA, switch)
    for switches in ((tiles(512),), (tiles(512), MODEL), (STREAM,), (GRAPHS,)):
        add(1, "sd15", 1024, 1, SDPA, *switches)
    for side, batch_size in ((1536, 1), (2048, 1), (1024, 4)):
        add(1, "sdxl", side, batch_size, SDPA)
    for switch in (("fuse_qkv_projections", {}), BLOCKS, SEQUENTIAL, ("enable_vae_upcast_copy", {})):
        add(1, "sdxl", 1024, 1, SDPA, switch)
    add(1, "sdxl", 1024, 1, SDPA, tiles(512), MODEL)
    add(1, "sdxl", 1024, 4, SDPA, SLICES)
    add(1, "sdxl-fp16-vae", 1024, 1, SDPA)

    for switches in (
        (("enable_naive_attention", {}),),
        (("enable_attention_slicing", {"slice_size": "max"}),),
        (("enable_attention_slicing", {"max_bytes": 256 * MIB}),),
        (("enable_sdpa", {"backend": "efficient"}),),
        (("enable_xformers_memory_efficient_attention", {}),),
    ):
        add(2, "sd15", 1024, 1, *switches)
    add(2, "sd15", 512, 1, ("enable_sdpa", {"backend": "math"}))
    add(2, "sd15", 512, 1, SDPA, LAST, ("enable_pointwise_matmul", {}))
    add(2, "sd15", 512, 1, SDPA, LAST, ("enable_fused_kernels", {}))
    add(2, "sd15", 512, 2, SDPA, LAST, MODEL)
    for switch in (SLICES, tiles(512)):
        add(2, "sd15", 1024, 4, SDPA, switch)
    for switch in (tiles(512), MODEL):
        add(2, "sd15", 2048, 1, SDPA, switch)
    add(2, "sdxl", 1024, 1, ("enable_naive_attention", {}))
    add(2, "sdxl", 2048, 1, SDPA, tiles(512), MODEL)
    for side in (512, 1024):
        add(2, "sd15", side, 1, SDPA, dtype="float32")
    return sorted(found, key=lambda cell: cell.group)


def build(cell: Cell, device: str, *, thin: bool) -> Any:
    """Make a cell's pipeline with its text encoders."""
    architecture = find(cell.architecture)
    dtype = getattr(torch, cell.dtype)
    if thin:
        architecture, dtype = thinned(architecture), torch.float32
    pipe: Any = assemble(architecture, dtype=dtype, device=device, seed=0, text_encoders=True)
    set_scheduler(pipe, "ddim")
    return pipe


def thinned(architecture: Any) -> Any:
    """An architecture whose layers are 32 channels wide."""
    levels = len(architecture.models["unet"].config["block_out_channels"])
    width, xl = 32, "sdxl" in architecture.name
    text = {"hidden_size": width, "intermediate_size": width, "num_hidden_layers": 2, "num_attention_heads": 2}
    unet = {"block_out_channels": (width,) * levels, "attention_head_dim": 2, "cross_attention_dim": width}
    if xl:
        unet |= {"cross_attention_dim": 2 * width, "attention_head_dim": (2,) * levels}
        unet |= {"transformer_layers_per_block": 1, "projection_class_embeddings_input_dim": width + 6 * 256}
    changes = {"unet": unet, "vae": {"block_out_channels": (width,) * 4, "layers_per_block": 1}}

    def changed(part: Any, given: dict[str, Any]) -> Any:
        return dataclasses.replace(part, config={**part.config, **given})

    return dataclasses.replace(
        architecture,
        models={name: changed(part, changes[name]) for name, part in architecture.models.items()},
        text_encoders={
            name: part and changed(part, {**text, "projection_dim": width})
            for name, part in architecture.text_encoders.items()
        },
    )


class CudaMeter:
    """Peaks of the caching allocator, stage by stage."""

    def __init__(self) -> None:
        gc.collect()
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        self.peaks: dict[str, dict[str, int]] = {}
        self.stage = "encode"
        torch.cuda.reset_peak_memory_stats()

    def begin(self, stage: str) -> None:
        """One stage ends and the next begins."""
        torch.cuda.synchronize()
        now = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
        before = self.peaks.get(self.stage, now)
        self.peaks[self.stage] = {name: max(now[name], before[name]) for name in now}
        self.stage = stage
        torch.cuda.reset_peak_memory_stats()

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Nothing to do: the allocator counts by itself."""
        yield


class LiveMeter:
    """The storages alive on a CPU, and the weights."""

    def __init__(self, weights: int) -> None:
        self.weights, self.live = weights, LiveBytes()
        self.peaks: dict[str, dict[str, int]] = {}
        self.stage = "encode"

    def begin(self, stage: str) -> None:
        """One stage ends and the next begins."""
        self.peaks[self.stage] = {"allocated": self.weights + self.live.peak}
        self.stage, self.live.peak = stage, self.live.live

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what operators make."""
        with self.live:
            yield


def draw(pipe: Any, cell: Cell, meter: Any, *, thin: bool) -> dict[str, dict[str, int]]:
    """Make pictures and return the peaks of each stage. Stages are told apart without a hook on any module."""
    encode, decode = pipe.encode_prompt, pipe.vae.decode

    def encoding(*args: Any, **kwargs: Any) -> Any:
        result = encode(*args, **kwargs)
        meter.begin("denoise")
        return result

    def decoding(*args: Any, **kwargs: Any) -> Any:
        meter.begin("decode")
        return decode(*args, **kwargs)

    side = cell.side // 8 if thin else cell.side
    vars(pipe)["encode_prompt"], vars(pipe.vae)["decode"] = encoding, decoding
    try:
        # what is recorded as graphs is recorded at the second picture
        for _ in range(2 if GRAPHS in cell.switches else 1):
            with meter.counting():
                pipe(
                    [PROMPT] * cell.batch_size,
                    height=side,
                    width=side,
                    num_inference_steps=STEPS,
                    output_type="pt",
                    generator=torch.Generator().manual_seed(0),
                )
            meter.begin("encode")
    finally:
        del vars(pipe)["encode_prompt"], vars(pipe.vae)["decode"]
    found: dict[str, dict[str, int]] = meter.peaks
    return found


def measure(pipe: Any, cell: Cell, *, thin: bool) -> dict[str, Any]:
    """Throw a cell's switches, measure, and take them off again; a failure is a result."""
    ledger = open_ledger(pipe)
    try:
        for action, given in cell.switches:
            getattr(pipe, action)(**given)
        weights = sum(part.nbytes for name in pipe.components for part in _weights(getattr(pipe, name, None)))
        meter = LiveMeter(weights) if thin else CudaMeter()
        return {"stages": draw(pipe, cell, meter, thin=thin)}
    except Exception as error:  # out of memory, a package that is not there, a kernel that refuses
        error.__traceback__ = None
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    finally:
        for action, _ in reversed(cell.switches):
            ledger = open_ledger(pipe)
            ledger.disable(pipe, action)
        gc.collect()


def _weights(part: Any) -> list[torch.Tensor]:
    return [*part.parameters(), *part.buffers()] if isinstance(part, torch.nn.Module) else []


def measured(path: Path, chosen: list[Cell], seconds: float, *, thin: bool) -> dict[str, Any]:
    """Measure what the file does not hold yet, writing it after each cell."""
    data: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    device = "cpu" if thin else "cuda"
    if "torch" not in data:
        data |= {"torch": torch.__version__, "diffusers": diffusers.__version__, "steps": STEPS, "tiny": thin}
        data["device"] = "CPU, live bytes" if thin else torch.cuda.get_device_name()
        data["conf"] = "PYTORCH_CUDA_ALLOC_CONF unset"
        if not thin:
            torch.zeros(1, device="cuda")
            free, total = torch.cuda.mem_get_info()
            data |= {"sm": list(torch.cuda.get_device_capability()), "total_bytes": total}
            data["context_bytes"] = total - free - torch.cuda.memory_reserved()
    until, pipe, group = time.monotonic() + seconds, None, None
    for cell in chosen:
        if cell.key in data["rows"] or time.monotonic() > until:
            continue
        if cell.group != group:
            pipe, group = None, cell.group
            gc.collect()
            pipe = turbo(build(cell, device, thin=thin))
        start = time.monotonic()
        row = {**dataclasses.asdict(cell), **measure(pipe, cell, thin=thin)}
        data["rows"][cell.key] = row | {"seconds": round(time.monotonic() - start, 2)}
        path.write_text(json.dumps(data, indent=1) + "\n")
        print(cell.key, row.get("error") or {name: peak["allocated"] // MIB for name, peak in row["stages"].items()})
    return data


def predicted(data: dict[str, Any], *, thin: bool) -> dict[str, list[tuple[float, str]]]:
    """Put predictions beside all measured stages; return (predicted over measured less one, key) of whole peaks."""
    errors: dict[str, list[tuple[float, str]]] = {"allocated": [], "reserved": []}
    predictors = {}
    # on a CPU no workspace is seen
    none = {"cublas_bytes": 0, "other_bytes": 0, "nchw_copies": (0.0, 0.0), "nhwc_copies": (0.0, 0.0)}
    workspaces = dataclasses.replace(workspaces_of((9, 0)), **none) if thin else None
    facts = DeviceFacts.card("H100") if thin or not torch.cuda.is_available() else probe("cuda")
    for key, row in data["rows"].items():
        if "stages" not in row:
            continue
        names = Cell.__dataclass_fields__
        cell = Cell(**{name: row[name] for name in names})
        kind = cell.architecture, cell.dtype
        if kind not in predictors:
            predictors[kind] = Predictor(build(cell, "meta", thin=thin), device=facts, workspaces=workspaces)
        side = cell.side // 8 if thin else cell.side
        options = [make_options(action, **given) for action, given in cell.switches]
        made = predictors[kind](height=side, width=side, batch_size=cell.batch_size, options=options)
        row["predicted"] = {
            stage.stage: {"allocated": comparable(made, stage.stage, thin=thin), "reserved": stage.reserved_bytes}
            for stage in made.stages
        }
        for kind_of, found in errors.items():
            if thin and kind_of == "reserved":
                continue
            peaks = [max(row[name][stage][kind_of] for stage in STAGES) for name in ("predicted", "stages")]
            found.append((peaks[0] / peaks[1] - 1, key))
    return errors


def comparable(made: MemoryPrediction, name: str, *, thin: bool) -> int:
    """What the meter can see: on a CPU neither workspaces nor the allocator's slack."""
    stage = made.stage(name)
    return stage.weights_bytes + stage.activation_bytes if thin else stage.allocated_bytes


def main() -> None:
    """Measure, predict, and say how well the two agree."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--seconds", type=float, default=460, help="start no cell after this long")
    parser.add_argument("--only", nargs="+", help="cells of these architectures, so that two processes share the work")
    parser.add_argument("--tiny", action="store_true", help="thin networks on the CPU, live bytes for peaks")
    parser.add_argument("--predict-only", action="store_true", help="measure nothing, needs no GPU")
    given = parser.parse_args()
    chosen = [cell for cell in cells() if not given.only or cell.architecture in given.only]
    if given.tiny:
        # a CPU has no offload, no graphs and no other kernels
        elsewhere = ("offload", "graphs", "xformers", "prompt_projections", "efficient", "upcast", "fused_kernels")
        chosen = [cell for cell in chosen if cell.side <= 1024 and not any(name in cell.key for name in elsewhere)]
    diffusers.utils.logging.set_verbosity_error()
    seconds = 0.0 if given.predict_only else given.seconds
    data = measured(given.results, chosen, seconds, thin=given.tiny)
    errors = predicted(data, thin=given.tiny)
    given.results.write_text(json.dumps(data, indent=1) + "\n")
    failed = [f"  {key}: {row['error']}" for key, row in data["rows"].items() if "error" in row]
    print(f"{len(errors['allocated'])} of {len(chosen)} cells measured, {len(failed)} failed", *failed, sep="\n")
    for name, found in errors.items():
        if not found:
            continue
        print(name)
        for error, key in sorted(found):
            print(f"{error:+8.2%}  {key}")
        sizes = [abs(error) for error, _ in found]
        within = sum(size <= 0.08 for size in sizes) / len(sizes)
        lowest, where = min(found)
        print(f"median error {statistics.median(sizes):.2%}; within 8 %: {within:.1%}; lowest {lowest:+.2%}: {where}")


if __name__ == "__main__":
    main()
