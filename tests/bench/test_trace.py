"""One denoising step profiled: exactly one call of the UNet in table and trace, and nothing left on afterwards."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import nn

from diffusers_turbo.bench import running
from diffusers_turbo.bench.cases import Case
from diffusers_turbo.bench.job import Job
from diffusers_turbo.bench.running import Contender
from diffusers_turbo.bench.trace import trace_step
from diffusers_turbo.errors import InvalidOptionError, NotSupportedError
from tests import tiny


@pytest.fixture
def make(monkeypatch):
    """Make a contender over the tiny pipeline, which stands in for what would be loaded."""

    def contender(**job: Any) -> Contender:
        monkeypatch.setattr(running, "load_for", lambda job, case: tiny.sd())
        case = Case(name="stock")
        return Contender(Job(**{"model": "tiny", "cases": (case,), "steps": 4, "batches": (2, 1), **job}), case)

    return contender


def operators(trace: Path) -> Counter[str]:
    events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    return Counter(event["name"] for event in events if event.get("cat") == "cpu_op")


def test_table_and_trace_hold_one_call_of_the_unet(make, tmp_path):
    contender = make()
    convolutions = []
    for module in contender.pipe.unet.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda module, args, output: convolutions.append(args[0].shape))
    kernels, trace = trace_step(contender, tmp_path)
    assert (kernels, trace) == (tmp_path / "stock-kernels.txt", tmp_path / "stock-trace.json")
    assert set(tmp_path.iterdir()) == {kernels, trace}
    # the call makes four steps and decodes; of these one step is in the trace
    in_one_step = len(convolutions) // 4
    counts = operators(trace)
    assert counts["aten::conv2d"] == in_one_step > 10
    assert counts["aten::scaled_dot_product_attention"] == len(contender.pipe.unet.attn_processors) > 2
    # the batch is the job's first one, twice for guidance
    assert convolutions[0][0] == 4
    text = kernels.read_text(encoding="utf-8")
    assert text.startswith("stock: one denoising step, by self_cpu_time_total\n")
    (line,) = (line for line in text.splitlines() if line.split()[:1] == ["aten::conv2d"])
    assert line.split()[-1] == str(in_one_step)


def test_a_second_trace_replaces_the_first(make, tmp_path):
    contender = make(steps=2)
    trace = tmp_path / "stock-trace.json"
    trace.write_text("old")
    assert trace_step(contender, tmp_path)[1] == trace
    assert operators(trace)["aten::conv2d"] > 10


def is_profiling() -> bool:
    return torch._C._autograd._profiler_enabled()


def test_one_step_is_refused_and_the_profiler_is_off_again(make, tmp_path):
    with pytest.raises(NotSupportedError, match="tracing one step of stock: found 1 step; needed: two steps"):
        trace_step(make(steps=1), tmp_path)
    assert not is_profiling()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()])
def test_an_error_in_the_traced_step_is_not_hidden_and_the_profiler_is_off_again(make, tmp_path, error):
    contender = make()
    calls, profiling = [], []

    def fail(module: Any, args: Any) -> None:
        calls.append(module)
        if len(calls) == 2:
            profiling.append(is_profiling())
            raise error

    contender.pipe.unet.register_forward_pre_hook(fail)
    with pytest.raises(type(error)):
        trace_step(contender, tmp_path)
    assert profiling == [True]
    assert not is_profiling()
    assert list(tmp_path.iterdir()) == []


def test_a_type_error_of_the_model_is_not_taken_for_a_missing_callback(make, tmp_path):
    contender = make()
    contender.pipe.unet.forward = lambda: None
    with pytest.raises(TypeError):
        trace_step(contender, tmp_path)


def test_a_pipeline_without_a_callback_is_refused(make, tmp_path, monkeypatch):
    def call(self: Any, prompt: Any, num_inference_steps: int = 50, generator: Any = None, output_type: str = "pt"):
        raise AssertionError("called")

    contender = make()
    monkeypatch.setattr(StableDiffusionPipeline, "__call__", call)
    with pytest.raises(NotSupportedError, match="found a pipeline without callback_on_step_end.*leave --trace out"):
        trace_step(contender, tmp_path)


def test_a_folder_that_cannot_be_written_to(make, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidOptionError, match="writing the kernel table to"):
        trace_step(make(steps=2), tmp_path / "file")
    assert (tmp_path / "file").read_text() == ""
