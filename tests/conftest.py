"""Shared fixtures; tests marked `gpu` are skipped without a CUDA device."""

from __future__ import annotations

import gc
import os

import diffusers
import pytest
import torch
from packaging.version import Version

from tests import tiny

if "PYTEST_XDIST_WORKER" in os.environ:
    # One core a worker: threads of two workers that wait for each other in spin loops cost more than they bring.
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start


LONGEST_FILES = (
    *("test_exactness.py", "test_interpreted.py", "test_switches.py", "test_sequences.py"),
    *("test_compiled.py", "test_blame.py", "test_check.py"),
)
"""Files that keep one of two workers busy for long: started last, the other one would wait for them."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip GPU tests where there is no GPU, and begin with the longest files."""
    items.sort(key=lambda item: item.path.name not in LONGEST_FILES)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


class _TorchWithoutAccelerators:
    """torch, but for the attribute that diffusers before 0.42 asks for a device and gets None without a GPU."""

    def __getattr__(self, name: str):
        if name == "accelerator":
            raise AttributeError(name)
        return getattr(torch, name)


@pytest.fixture(scope="module", autouse=True)
def _quick_collections():
    """Collections of garbage, many of which tests ask for, need not look through what was there before their file."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _group_offload_without_an_accelerator(monkeypatch):
    """Let an older diffusers offload from the CPU to the CPU, as the newer ones do, so that its hooks can be tested."""
    if not torch.accelerator.is_available() and Version(diffusers.__version__) < Version("0.42"):
        monkeypatch.setattr("diffusers.hooks.group_offloading.torch", _TorchWithoutAccelerators())


@pytest.fixture(autouse=True)
def _give_gpu_memory_back(request):
    """Several processes may test on one GPU: what one keeps for its next test, the others cannot have."""
    yield
    if torch.cuda.is_available() and request.node.get_closest_marker("gpu") is not None:
        torch.cuda.empty_cache()


@pytest.fixture
def pipe():
    """A fresh tiny Stable Diffusion pipeline."""
    return tiny.sd()


@pytest.fixture
def xl_pipe():
    """A fresh tiny Stable Diffusion XL pipeline."""
    return tiny.sdxl()


@pytest.fixture
def pixart_pipe():
    """A fresh tiny PixArt pipeline."""
    return tiny.pixart()
