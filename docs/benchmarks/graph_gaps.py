"""How far apart the kernels of a CUDA graph lie, by the graph's shape.

python docs/benchmarks/graph_gaps.py docs/benchmarks/graph-gaps-h100.json [--arch sd15 sdxl]

Graphs of small kernels one after the other, and of one thing more:

    line              nothing more
    memset first      a memset of four bytes before them
    memset between    one in their middle
    empty node        a node that does nothing and waits for nothing
    branch            a kernel of its own beside the first of them, on which the last one waits

and for each architecture the graph of a full-size UNet's step, as the instant tier records it and with an empty node.

Times on the device and of the host for one launch: medians, in turns but for UNets. A node that lets the driver launch
the graph in another way shows in both.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusers_turbo import auto_optimize
from diffusers_turbo.bench.architectures import build
from diffusers_turbo.bench.environment import read_environment
from diffusers_turbo.graphs.call import GraphedCall
from diffusers_turbo.graphs.memsets import driver_for

KEPT: list[Callable[[], None]] = []
"""What was recorded, with the tensors that the graphs write to."""

COUNTS = (50, 500, 1500)
ROUNDS, REPLAYS = 15, 10


def memset(target: Tensor) -> None:
    """Set four bytes on the current stream."""
    stream = torch.cuda.current_stream().cuda_stream
    driver = driver_for(torch.cuda.current_device())
    assert driver is not None
    place, words = ctypes.c_uint64(target.data_ptr()), ctypes.c_size_t(1)
    driver._call("cuMemsetD32Async", place, ctypes.c_uint(0), words, ctypes.c_void_p(stream))


def line(count: int, before: Callable[[int], None] = lambda index: None) -> Callable[[], None]:
    """Return what launches so many kernels, each after `before` of its index."""
    x = torch.zeros(1 << 16, device="cuda")

    def run() -> None:
        for index in range(count):
            before(index)
            x.add_(1)

    return run


def with_branch(count: int) -> Callable[[], None]:
    """Return what launches so many kernels, and one beside them."""
    side, y, run = torch.cuda.Stream(), torch.zeros(1, device="cuda"), line(count - 2)

    def both() -> None:
        main = torch.cuda.current_stream()
        side.wait_stream(main)
        with torch.cuda.stream(side):
            y.add_(1)
        run()
        main.wait_stream(side)
        y.add_(1)

    return both


def record(run: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """Capture it and make it ready."""
    KEPT.append(run)
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        run()
    graph.instantiate()
    return graph


def with_empty_node(graph: torch.cuda.CUDAGraph) -> torch.cuda.CUDAGraph:
    """Add a node that does nothing, and make the graph ready anew."""
    driver, node = driver_for(torch.cuda.current_device()), ctypes.c_void_p()
    assert driver is not None
    raw = ctypes.c_void_p(graph.raw_cuda_graph())
    driver._call("cuGraphAddEmptyNode", ctypes.byref(node), raw, None, ctypes.c_size_t(0))
    graph.instantiate()
    return graph


def step_of(arch: str) -> tuple[Any, torch.cuda.CUDAGraph]:
    """Return a pipeline, and the graph of its UNet's step, which lives as long as it does."""
    pipe = auto_optimize(build(arch, dtype=torch.float16, device="cuda"), tier="instant")
    for _ in range(3):
        pipe("A photo", num_inference_steps=4, output_type="latent")
    call = pipe.unet._compiled_call_impl
    while not isinstance(call, GraphedCall):
        call = call.inner
    (kept,) = call.graphs.values()
    return pipe, kept.capture.graph


def graphs_of(count: int) -> dict[str, torch.cuda.CUDAGraph]:
    """One graph of each shape."""
    target = torch.zeros(1, dtype=torch.int32, device="cuda")

    def memset_at(place: int) -> Callable[[int], None]:
        return lambda index: memset(target) if index == place else None

    return {
        "line": record(line(count)),
        "memset first": record(line(count, memset_at(0))),
        "memset between": record(line(count, memset_at(count // 2))),
        "empty node": with_empty_node(record(line(count))),
        "branch": record(with_branch(count)),
    }


def measure(graph: torch.cuda.CUDAGraph) -> tuple[float, float]:
    """Return milliseconds of one replay: on the device, of many in a row; of the host, while the device is idle."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    began = time.perf_counter()
    graph.replay()
    host_ms = 1000 * (time.perf_counter() - began)
    start.record()
    for _ in range(REPLAYS):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / REPLAYS, host_ms


def row(what: str, shape: str, count: int, found: list[tuple[float, float]]) -> dict[str, Any]:
    """Print and return one row."""
    device_ms, host_ms = (statistics.median(column) for column in zip(*found, strict=True))
    each = 1000 * device_ms / count
    print(f"{what:8} {count:5} {shape:15} {device_ms:8.3f} ms, {each:6.2f} us a node; {host_ms:7.3f} ms of the host")
    return {"what": what, "shape": shape, "nodes": count, "device_ms": device_ms, "host_ms": host_ms}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="where the JSON goes")
    parser.add_argument("--arch", nargs="*", default=[])
    given = parser.parse_args()
    rows = []
    for count in COUNTS:
        graphs = graphs_of(count)
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in graphs}
        for graph in graphs.values():
            measure(graph)
        for _ in range(ROUNDS):
            for name, graph in graphs.items():
                times[name].append(measure(graph))
        rows += [row("adds", name, count, found) for name, found in times.items()]
    for arch in given.arch:
        pipe, graph = step_of(arch)
        driver = driver_for(torch.cuda.current_device())
        assert driver is not None
        nodes = len(driver.nodes(graph.raw_cuda_graph()))
        measure(graph)
        for _ in range(2):  # whether the clock stays
            rows.append(row(arch, "as it is", nodes, [measure(graph) for _ in range(ROUNDS)]))
        with_empty_node(graph)
        measure(graph)
        rows.append(row(arch, "empty node", nodes, [measure(graph) for _ in range(ROUNDS)]))
        del pipe
    environment = read_environment("cuda", measure=False)
    given.output.write_text(json.dumps({"environment": environment, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
