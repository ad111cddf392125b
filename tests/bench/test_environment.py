from __future__ import annotations

import getpass
import json
import os
import platform
import re
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from diffusers_turbo.bench import environment, rates
from diffusers_turbo.bench.environment import read_environment
from diffusers_turbo.facts.device import DeviceFacts

VERSIONS = "python torch cuda cudnn diffusers transformers accelerate xformers triton diffusers_turbo"


@pytest.fixture(scope="module")
def measured() -> dict:
    return read_environment("cpu")


def test_the_cpus_environment_is_complete(measured):
    assert set(measured["versions"]) == set(VERSIONS.split())
    assert measured["versions"]["torch"] == torch.__version__
    assert measured["versions"]["python"] == platform.python_version()
    assert measured["versions"]["diffusers_turbo"]
    assert measured["device_type"] == "cpu"
    assert measured["device_name"] == measured["cpu"] != ""
    assert 0 < measured["cpu_cores"] <= (os.cpu_count() or 1)
    assert measured["total_bytes"] > 2**28
    assert measured["sm"] is measured["driver"] is measured["power_limit_w"] is None


def test_the_rates_are_measured_with_dtype_and_size(measured):
    assert measured["matmul_tflops"] > 0
    assert (measured["matmul_dtype"], measured["matmul_size"]) == ("float32", 1024)
    assert measured["copy_gb_per_s"] > 0
    assert (measured["copy_dtype"], measured["copy_bytes"]) == ("float32", 128 * 2**20)


def test_the_date_is_now_in_utc(measured):
    date = datetime.fromisoformat(measured["date_utc"])
    assert date.utcoffset() == timedelta(0)
    assert abs(datetime.now(UTC) - date) < timedelta(hours=1)


def test_it_is_plain_data_without_names_and_paths(measured):
    text = json.dumps(measured, allow_nan=False)
    assert json.loads(text) == measured
    values = [str(value) for value in [*measured.values(), *measured["versions"].values()]]
    for private in (platform.node(), str(Path.home()), os.getcwd(), getpass.getuser()):
        # a user called "root" or "linux" may be a part of other words
        assert not any(re.search(rf"(?<!\w){re.escape(private)}(?!\w)", value) for value in values if private)
    assert "/" not in text.replace("GNU/Linux", "")


def test_without_measuring_the_rates_are_none(monkeypatch):
    monkeypatch.setattr(rates, "measure_rates", lambda *args: pytest.fail("measured"))
    found = read_environment("cpu", measure=False)
    assert [found[name] for name in environment._RATES] == [None] * 6
    assert found["notes"] == []


def test_measuring_moves_no_random_state(monkeypatch):
    monkeypatch.setattr(rates, "_BUDGET_S", 0.01)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    rates.measure_rates("cpu", "float32")
    assert torch.equal(torch.get_rng_state(), before)


def test_rates_follow_from_the_times(monkeypatch):
    """2 x 1024^3 operations in 1 ms, 128 MiB read and written in 10 ms."""
    times = iter([1e-3, 1e-2])
    monkeypatch.setattr(rates, "_median_s", lambda call, device: next(times))
    found = rates.measure_rates("cpu", "float32")
    assert found["matmul_tflops"] == pytest.approx(2 * 1024**3 / 1e-3 / 1e12, rel=1e-3)
    assert found["copy_gb_per_s"] == pytest.approx(2 * 128 * 2**20 / 1e-2 / 1e9, rel=1e-3)


def test_timing_calls_the_function_and_returns_a_median(monkeypatch):
    seconds = iter([0.2, 0.3, 0.1])
    calls = []
    monkeypatch.setattr(rates, "seconds_a_call", lambda call, device, launches: calls.append(launches) or next(seconds))
    monkeypatch.setattr(rates, "_BUDGET_S", 0.45)
    assert rates._median_s(lambda: None, "cpu") == pytest.approx(0.2)
    assert calls == [1, 1, 1]  # one to choose by, then two that fit into the budget


def test_a_device_without_memory_left_gives_a_note_and_no_path(monkeypatch):
    def full(device, dtype):
        raise torch.OutOfMemoryError("out of memory in /home/someone/x.cpp\nmore")

    monkeypatch.setattr(rates, "measure_rates", full)
    found = read_environment("cpu")
    assert found["matmul_tflops"] is None
    assert found["notes"] == ["no rates measured: OutOfMemoryError: out of memory in (a path)"]


def test_a_device_torch_cannot_use_is_said_and_not_measured(monkeypatch):
    def missing(index):
        raise RuntimeError("Found no NVIDIA driver")

    monkeypatch.setattr(torch.cuda, "get_device_properties", missing)
    found = read_environment("cuda:0")
    assert found["matmul_tflops"] is None
    assert found["notes"] == ["no rates measured: torch cannot use cuda:0: RuntimeError: Found no NVIDIA driver"]


class FakeSMI:
    """Stands for subprocess.run and remembers what it was asked."""

    def __init__(self, told: str | Exception) -> None:
        self.told, self.command = told, []

    def __call__(self, command, **options):
        self.command = command
        if isinstance(self.told, Exception):
            raise self.told
        return SimpleNamespace(stdout=self.told)


def ask(monkeypatch, told: str | Exception) -> tuple[dict, FakeSMI]:
    smi = FakeSMI(told)
    monkeypatch.setattr(environment.shutil, "which", lambda name: name)
    monkeypatch.setattr(environment.subprocess, "run", smi)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="abc-1"))
    return environment._ask_nvidia_smi(DeviceFacts.card("RTX 3060")), smi


def test_nvidia_smi_tells_driver_power_and_clock_of_the_right_card(monkeypatch):
    found, smi = ask(monkeypatch, "550.54.15, 170.00, 2100\n")
    assert found == {"driver": "550.54.15", "power_limit_w": 170.0, "clock_limit_mhz": 2100.0}
    assert smi.command[1:] == [
        "--query-gpu=driver_version,power.limit,clocks.max.sm",
        "--format=csv,noheader,nounits",
        "--id=GPU-abc-1",
    ]


@pytest.mark.parametrize(
    ("told", "driver"),
    [
        ("550.1, [N/A], [N/A]\n", "550.1"),
        ("", None),
        ("No devices were found", None),
        ("1, 2, 3\n4, 5, 6\n", None),  # two cards where one was asked for
        (OSError("not runnable"), None),
        (subprocess.TimeoutExpired("nvidia-smi", 10), None),
        (subprocess.CalledProcessError(9, "nvidia-smi"), None),
    ],
)
def test_what_nvidia_smi_does_not_tell_is_none(monkeypatch, told, driver):
    found, _ = ask(monkeypatch, told)
    assert found == {"driver": driver, "power_limit_w": None, "clock_limit_mhz": None}


def test_without_nvidia_smi_nothing_is_asked(monkeypatch):
    monkeypatch.setattr(environment.shutil, "which", lambda name: None)
    monkeypatch.setattr(environment.subprocess, "run", lambda *args, **options: pytest.fail("asked"))
    assert environment._ask_nvidia_smi(DeviceFacts.card("RTX 3060"))["driver"] is None


@pytest.mark.gpu
def test_a_gpus_rates_are_measured_in_half_precision():
    found = read_environment("cuda")
    assert found["matmul_tflops"] > 0.1
    assert found["copy_gb_per_s"] > 10
    assert found["matmul_size"] in (4096, 8192)
    assert len(found["sm"]) == 2
