"""How long a new process waits for its first picture, from the call of auto_optimize to the picture on the host.

python docs/benchmarks/first_image.py MODEL RESULTS.json [--scheduler ddim] [--tiers none instant] [--repeats 3]
                                       [--kept]

MODEL is a folder or "arch:sd15". The pipeline is on the device before the clock starts. Each tier runs in processes of
its own: once with empty caches of Triton and Inductor ("empty"), then again with what that left there ("filled"). With
--kept these caches are empty for every process, and what is filled is the folder of `auto_optimize(cache_dir=True)`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PROMPT = "A photo"


def child(given: argparse.Namespace) -> dict[str, Any]:
    """Measure one process: this one."""
    import torch

    from diffusers_turbo import auto_optimize
    from diffusers_turbo.bench.loading import load_model
    from diffusers_turbo.bench.schedulers import set_scheduler

    cuda = torch.cuda.is_available()
    pipe = load_model(given.model, "float16" if cuda else "float32", "cuda" if cuda else "cpu")
    if given.scheduler:
        set_scheduler(pipe, given.scheduler)

    def picture() -> float:
        start = time.perf_counter()
        pipe(PROMPT, num_inference_steps=given.steps, output_type="pt").images.cpu()
        return time.perf_counter() - start

    if cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    if given.child != "none":
        pipe = auto_optimize(pipe, tier=given.child, cache_dir=given.kept or None)
    planned_s = time.perf_counter() - began
    picture()
    first_s = time.perf_counter() - began
    if given.child == "compiled":
        from torch._dynamo.utils import compile_times

        print(compile_times(repr="str", aggregate=True), file=sys.stderr)
    return {"planned_s": planned_s, "first_image_s": first_s, "second_image_s": picture(), "third_image_s": picture()}


def in_new_process(tier: str, given: argparse.Namespace, cache: str) -> dict[str, Any]:
    """Measure a process whose compilers keep what they make in `cache`."""
    # a folder of its own for each process, or one for all
    torchs = tempfile.mkdtemp(dir=cache) if given.kept else cache
    caches = {"TRITON_CACHE_DIR": f"{torchs}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{torchs}/inductor"}
    caches["DIFFUSERS_TURBO_CACHE"] = f"{cache}/kept"
    command = [sys.executable, __file__, given.model, given.results, "--child", tier, "--steps", str(given.steps)]
    command += ["--scheduler", given.scheduler] if given.scheduler else []
    command += ["--kept"] if given.kept else []
    done = subprocess.run(command, env={**os.environ, **caches}, check=True, stdout=subprocess.PIPE, text=True)
    seconds: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return {name: round(value, 3) for name, value in seconds.items()}


def main() -> None:
    """Measure every tier and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("results")
    parser.add_argument("--scheduler")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--tiers", nargs="+", default=["none", "instant"])
    parser.add_argument("--repeats", type=int, default=3, help="processes with filled caches")
    parser.add_argument("--kept", action="store_true", help="nothing but what auto_optimize(cache_dir=True) keeps")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(child(given)))
        return
    import torch

    from diffusers_turbo.bench.environment import read_environment

    environment = read_environment("cuda" if torch.cuda.is_available() else "cpu", measure=False)
    results: dict[str, Any] = {
        "model": given.model,
        "steps": given.steps,
        "kept": given.kept,
        "environment": environment,
    }
    for tier in given.tiers:
        with tempfile.TemporaryDirectory() as cache:
            empty = in_new_process(tier, given, cache)
            filled = [in_new_process(tier, given, cache) for _ in range(given.repeats)]
        results[tier] = {"empty": empty, "filled": filled}
        Path(given.results).write_text(json.dumps(results, indent=2) + "\n")
        median = statistics.median(run["first_image_s"] for run in filled) if filled else float("nan")
        print(f"{tier}: first image {empty['first_image_s']:.2f} s with empty caches, {median:.2f} s with filled ones")


if __name__ == "__main__":
    main()
