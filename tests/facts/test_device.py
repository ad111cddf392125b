from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
import torch

from diffusers_turbo import plan
from diffusers_turbo.facts import kernels, probing
from diffusers_turbo.facts.device import (
    DeviceFacts,
    lacks_tensor_cores,
    missing_kernels,
    predict_sdpa,
    probe,
    unusable_formats,
)
from diffusers_turbo.facts.host import cxx_compiler, host_memory
from tests import tiny


def test_probing_the_cpu_says_what_is_there():
    facts = probe("cpu")
    assert (facts.device, facts.sm, facts.assumed) == ("cpu", None, False)
    assert 0 < facts.free_bytes <= facts.total_bytes
    assert facts.versions["torch"] == torch.__version__
    assert "python" in facts.versions
    assert not facts.fp16
    assert "NaN" in facts.refusals["fp16"]


def test_probing_takes_less_than_three_seconds():
    probe()
    start = time.perf_counter()
    probe()
    assert time.perf_counter() - start < 3


def test_importing_creates_no_cuda_context_and_imports_no_torch_here():
    code = (
        "import sys; import diffusers_turbo.facts.device, diffusers_turbo.facts.cards;"
        "torch = sys.modules.get('torch'); assert torch is None or not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_kernels_are_tried_lazily_and_once(monkeypatch):
    calls = []
    monkeypatch.setattr("diffusers_turbo.facts.kernels.probe_sdpa", lambda device: calls.append(device) or {"math": ()})
    facts = probe("cpu")
    assert calls == []
    assert facts.sdpa_kernels == facts.sdpa_kernels == {"math": ()}
    assert calls == ["cpu"]


def test_a_plan_tries_its_own_dtype_once_and_no_xformers_beside_a_fused_kernel(monkeypatch):
    """Each costs the first image of a new process up to seconds on a GPU."""
    tried = []

    def probe_sdpa(device, dtypes=("all",)):
        tried.append(dtypes)
        return {"flash": dtypes, "math": dtypes}

    monkeypatch.setattr("diffusers_turbo.facts.kernels.probe_sdpa", probe_sdpa)
    monkeypatch.setattr("diffusers_turbo.facts.kernels.probe_xformers", lambda device: tried.append("xformers") or {})
    facts = probe("cpu")
    for _ in range(2):
        plan(tiny.sd(), facts)
    assert tried == [("float32",)]
    assert facts.sdpa_kernels == {"flash": ("all",), "math": ("all",)}
    monkeypatch.setattr("diffusers_turbo.facts.kernels.probe_sdpa", lambda device, dtypes=(): {"math": dtypes})
    plan(tiny.sd(), probe("cpu"))
    assert tried[-1] == "xformers"


def test_the_cpus_kernels_really_run():
    facts = probe("cpu")
    assert "float32" in facts.sdpa_kernels["flash"]
    assert "float32" in facts.sdpa_kernels["math"]
    assert facts.xformers_kernels == {}
    assert not facts.kernels_predicted
    assert facts.fused_sdpa("float32") == ("flash",)


def test_probing_moves_no_random_state_and_no_global_flag():
    torch.manual_seed(7)
    random_state = torch.get_rng_state()
    flags = (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled())
    assert probe("cpu").sdpa_kernels
    assert torch.equal(torch.get_rng_state(), random_state)
    assert (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()) == flags


def test_a_kernel_that_runs_but_is_wrong_is_left_out():
    from diffusers_turbo.facts import kernels

    assert kernels._dtypes_that_run(lambda q, k, v: v, "cpu") == ()
    assert kernels._dtypes_that_run(lambda q, k, v: q * float("nan"), "cpu") == ()


def test_a_missing_cuda_device_is_a_fact_and_no_error(monkeypatch):
    def no_device(index):
        raise RuntimeError("Found no NVIDIA driver on your system.\nAnd more.")

    monkeypatch.setattr(torch.cuda, "get_device_properties", no_device)
    facts = probe("cuda:0")
    assert facts.refusals["torch"] == "torch cannot use cuda:0: RuntimeError: Found no NVIDIA driver on your system."
    assert facts.total_bytes == 0


class _Properties:
    name = "Tesla P100-PCIE-16GB"
    major, minor = 6, 0
    total_memory = 16 * 2**30
    multi_processor_count = 56


def _simulate_cuda(monkeypatch, arch_list, hip=None):
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: arch_list)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: _Properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (15 * 2**30, 16 * 2**30))
    monkeypatch.setattr(torch.version, "hip", hip)


def test_a_torch_without_kernels_for_the_card_is_a_refusal(monkeypatch):
    _simulate_cuda(monkeypatch, ["sm_75", "sm_80", "sm_90"])
    facts = probe("cuda:0")
    assert facts.refusals["torch"] == "this torch was built for sm_75, sm_80, sm_90, and the card is SM 6.0"
    assert (facts.total_bytes, facts.free_bytes, facts.multiprocessors) == (16 * 2**30, 15 * 2**30, 56)


def test_a_torch_with_kernels_for_the_card_is_fine(monkeypatch):
    _simulate_cuda(monkeypatch, ["sm_60", "sm_80"])
    assert "torch" not in probe("cuda:0").refusals


def test_an_amd_card_has_no_sm_level(monkeypatch):
    _simulate_cuda(monkeypatch, ["gfx942"], hip="6.4")
    facts = probe("cuda:0")
    assert facts.sm is None
    assert not facts.tensor_cores
    assert "torch" not in facts.refusals


@pytest.mark.parametrize(
    ("sm", "arch_list", "runs"),
    [
        ((8, 6), ("sm_80",), True),
        ((8, 0), ("sm_86",), False),
        ((9, 0), ("sm_86",), False),
        ((9, 0), ("sm_86", "compute_86"), True),
        ((7, 0), ("sm_75", "compute_75"), False),
        ((9, 0), ("sm_90a",), True),
        ((10, 3), ("sm_100a",), False),
        ((12, 1), ("sm_120f",), True),
        ((12, 0), ("sm_100f",), False),
        ((12, 0), ("sm_75", "sm_80", "sm_120"), True),
        ((8, 9), (), False),
    ],
)
def test_kernels_for_a_card_follow_cudas_compatibility_rules(sm, arch_list, runs):
    assert (missing_kernels(sm, arch_list) == []) == runs


@pytest.mark.parametrize(
    "name", ["NVIDIA GeForce GTX 1650", "NVIDIA GeForce GTX 1660 Ti", "NVIDIA T600", "Quadro T1000"]
)
def test_small_turing_cards_have_no_tensor_cores_and_unsafe_fp16(name):
    assert lacks_tensor_cores((7, 5), name)
    assert "NaN" in unusable_formats("cuda", (7, 5), name)["fp16"]


@pytest.mark.parametrize("name", ["Tesla T4", "NVIDIA GeForce RTX 2060", "Quadro RTX 6000", "NVIDIA TITAN RTX"])
def test_large_turing_cards_have_tensor_cores(name):
    assert not lacks_tensor_cores((7, 5), name)
    assert "fp16" not in unusable_formats("cuda", (7, 5), name)


def test_predictions_follow_the_level():
    assert set(predict_sdpa("cuda", (7, 5))) == {"efficient", "math"}
    assert "bfloat16" not in predict_sdpa("cuda", (7, 5))["efficient"]
    assert set(predict_sdpa("cuda", (8, 6))) == {"flash", "efficient", "cudnn", "math"}
    assert set(predict_sdpa("mps", None)) == {"math"}


def test_facts_are_frozen_and_serialise():
    facts = DeviceFacts.card("T4")
    with pytest.raises(AttributeError):
        facts.name = "other"
    data = json.loads(facts.to_json())
    assert data["sm"] == [7, 5]
    assert data["bf16"] is False
    assert "sdpa_kernels" not in facts.as_dict(kernels=False)


def test_mps_reads_its_own_memory(monkeypatch):
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 10 * 2**30)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 2**30)
    facts = probe("mps")
    assert (facts.total_bytes, facts.free_bytes) == (10 * 2**30, 9 * 2**30)
    assert not facts.tf32


def test_a_broken_triton_is_no_triton(monkeypatch):
    monkeypatch.setattr(probing.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "triton", None)
    assert not probing._has_triton()


def test_the_host_is_read_without_raising(monkeypatch, tmp_path):
    total, available = host_memory()
    assert 0 < available <= total
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    assert cxx_compiler() is None


@pytest.mark.gpu
def test_a_gpu_is_probed_without_being_changed():
    facts = probe()
    assert facts.device_type == "cuda"
    assert facts.sm == torch.cuda.get_device_capability()
    assert "torch" not in facts.refusals
    assert 0 < facts.free_bytes <= facts.total_bytes
    assert facts.sdpa_kernels["math"]
    for dtype in ("float16", "float32"):
        assert facts.fused_sdpa(dtype)
    # cuDNN's operator takes float32 and answers NaN
    assert "float32" not in facts.sdpa_kernels.get("cudnn", ())


@pytest.mark.gpu
def test_prediction_and_trial_agree_on_this_gpu():
    facts = probe()
    predicted = predict_sdpa("cuda", facts.sm)
    assert {name: set(dtypes) for name, dtypes in facts.sdpa_kernels.items()} == {
        name: set(dtypes) for name, dtypes in predicted.items()
    }


def test_cudnn_is_not_tried_in_float32(monkeypatch):
    tried = []
    monkeypatch.setattr(
        kernels, "_dtypes_that_run", lambda call, device, dtypes: tried.append(tuple(dtypes)) or ("ran",)
    )
    assert set(kernels.probe_sdpa("cuda")) == {"flash", "efficient", "cudnn", "math"}
    assert tried.count(("float16", "bfloat16")) == 1
    assert tried.count(("float16", "bfloat16", "float32")) == 3
