"""What a new process pays until its first picture: eager, compiled, and with a UNet that was exported before.

python docs/benchmarks/exported_unet.py MODEL RESULTS.json [--dtype float16] [--device cuda]

Every variant runs in a process of its own, with an empty compile cache. Seconds count from the loaded pipeline on.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

STEPS = 20
PROMPT = "a flat emoji of rocket"


def child(job: str, model: str, dtype: str, device: str, package: str) -> dict[str, Any]:
    """Run one variant in this process."""
    import torch
    from diffusers import DiffusionPipeline

    from diffusers_turbo import turbo

    pipe: Any = turbo(DiffusionPipeline.from_pretrained(model, dtype=getattr(torch, dtype)).to(device))
    pipe.set_progress_bar_config(disable=True)
    weights = sum(tensor.numel() * tensor.element_size() for tensor in pipe.unet.parameters())

    def now() -> float:
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter()

    began = now()
    if job == "export":
        pipe.export_unet(package)
        return {"export_s": now() - began, "package_bytes": os.path.getsize(package), "weight_bytes": weights}
    if job == "exported":
        pipe.load_exported_unet(package)
    elif job == "compiled":
        pipe.compile_unet(dynamic=True)
    marks = {"switch_s": now() - began}
    for name in ("first_picture_s", "second_picture_s"):
        start = now()
        pipe(PROMPT, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(0))
        marks[name] = now() - start
    marks["until_first_picture_s"] = marks["switch_s"] + marks["first_picture_s"]
    if device.startswith("cuda"):
        marks["peak_bytes"] = torch.cuda.max_memory_allocated()
    return marks


def in_new_process(job: str, arguments: list[str], cache: str) -> dict[str, Any]:
    """Run a variant in a new process, with a compile cache of its own."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": os.path.join(cache, job)}
    command = [sys.executable, __file__, "--child", job, *arguments]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {name: round(value, 3) if isinstance(value, float) else value for name, value in found.items()}


def main() -> None:
    """Measure every variant and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("results")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(child(given.child, given.model, given.dtype, given.device, given.results)))
        return
    import diffusers
    import torch

    results: dict[str, Any] = {
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "device": torch.cuda.get_device_name() if given.device.startswith("cuda") else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "dtype": given.dtype,
        "steps": STEPS,
    }
    with tempfile.TemporaryDirectory() as folder:
        arguments = [given.model, os.path.join(folder, "unet.pt2"), "--dtype", given.dtype, "--device", given.device]
        for job in ("export", "eager", "exported", "compiled"):
            results[job] = in_new_process(job, arguments, folder)
            Path(given.results).write_text(json.dumps(results, indent=2) + "\n")
            print(job, results[job], flush=True)


if __name__ == "__main__":
    main()
