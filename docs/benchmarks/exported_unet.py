"""What a new process pays until its first picture: eager, compiled, and with a UNet that was exported before.

python docs/benchmarks/exported_unet.py MODEL RESULTS.json [--dtype float16] [--device cuda] [--jobs export eager ...]

MODEL is a folder or "arch:sd15". Every variant runs in a process of its own, with an empty compile cache. Seconds count
from the loaded pipeline on. On a GPU the UNet is channels-last throughout; "exported-graphs" has CUDA graphs over the
exported code. Each variant draws the same picture, and says how far it is from the first one's, in dB.
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
JOBS = ("export", "eager", "exported", "exported-graphs", "compiled")


def child(job: str, model: str, dtype: str, device: str, package: str) -> dict[str, Any]:
    """Run one variant in this process."""
    import torch

    from diffusers_turbo import turbo
    from diffusers_turbo.bench.loading import load_model
    from diffusers_turbo.parity import distance

    torch.manual_seed(0)  # an architecture's weights are drawn
    pipe: Any = turbo(load_model(model, dtype, device))
    weights = sum(tensor.numel() * tensor.element_size() for tensor in pipe.unet.parameters())
    cuda = device.startswith("cuda")

    def now() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    began = now()
    if cuda:
        pipe.enable_channels_last()
    if job == "export":
        pipe.export_unet(package)
        return {"export_s": now() - began, "package_bytes": os.path.getsize(package), "weight_bytes": weights}
    if job.startswith("exported"):
        pipe.load_exported_unet(package)
        if job.endswith("graphs"):
            pipe.enable_cuda_graphs()
    elif job == "compiled":
        pipe.compile_unet(dynamic=True)
    marks = {"switch_s": now() - began}
    for name in ("first_picture_s", "second_picture_s", "third_picture_s"):
        start, generator = now(), torch.Generator().manual_seed(0)
        made = pipe(PROMPT, num_inference_steps=STEPS, generator=generator, output_type="pt").images
        marks[name] = now() - start
    marks["until_first_picture_s"] = marks["switch_s"] + marks["first_picture_s"]
    if cuda:
        marks["peak_bytes"] = torch.cuda.max_memory_allocated()
    pictures = Path(package).with_suffix(".pt")
    if pictures.exists():
        marks["psnr_db"] = distance(made.cpu(), torch.load(pictures)).psnr_db
    else:
        torch.save(made.cpu(), pictures)
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
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=JOBS)
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
        for job in given.jobs:
            results[job] = in_new_process(job, arguments, folder)
            Path(given.results).write_text(json.dumps(results, indent=2) + "\n")
            print(job, results[job], flush=True)


if __name__ == "__main__":
    main()
