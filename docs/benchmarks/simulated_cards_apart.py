"""Processes of their own for `simulated_cards.py`, forked from one that has imported everything but leaves the GPU be.

CUDA that was started there would not work in them, and some imports start it (torchao's): to be imported before all
else, it hides the GPU until the fork. In one of them PyTorch can be made to tell of a smaller card.
"""

# ruff: noqa: E402
from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

VISIBLE = os.environ.get("CUDA_VISIBLE_DEVICES")
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "PYTORCH_NVML_BASED_CUDA_CHECK": "1", "XFORMERS_FORCE_DISABLE_TRITON": "1"}

import torch
from simulated_cards_tables import Row

FORK = multiprocessing.get_context("fork")
THREADS = torch.get_num_threads()


def apart(work: Callable[[], Row], limit: float) -> Row:
    """Return what a function returns in a forked process; what ends the process is a result, too."""
    receiver, sender = FORK.Pipe(duplex=False)
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        process = FORK.Process(target=_tell, args=(work, sender, said.fileno()))
        process.start()
        sender.close()
        try:
            if not receiver.poll(limit):
                return {"failed": f"took longer than {limit:g} s"}
            row: Row = json.loads(receiver.recv())
            return row
        except EOFError:
            process.join()
            said.seek(0)
            return {"failed": (said.read().strip().splitlines() or [f"exit status {process.exitcode}"])[-1][:300]}
        finally:
            process.kill()
            process.join()
            receiver.close()


def _tell(work: Callable[[], Row], sender: Any, said: int) -> None:
    """Be the forked process: free to use CUDA and every thread, and to say what is read if it dies."""
    for stream in (1, 2):
        os.dup2(said, stream)
    del os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"], os.environ["CUDA_VISIBLE_DEVICES"]
    if VISIBLE is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = VISIBLE
    torch.set_num_threads(THREADS)
    sender.send(json.dumps(work()))


def required(work: Callable[[], Row]) -> Row:
    """Return what a function returns in a forked process; nothing goes on without."""
    row = apart(work, 300)
    if "failed" in row:
        raise SystemExit(row["failed"])
    return row


@contextlib.contextmanager
def as_card(total: int) -> Iterator[None]:
    """Let PyTorch answer as on a card of so many bytes, to those who go by how much there is and how much is free.

    A cap on its allocator is not seen in either answer. That of a real card of this size is what they would go by.
    """
    properties = torch.cuda.get_device_properties

    def mem_get_info(device: Any = None) -> tuple[int, int]:
        return max(0, total - torch.cuda.memory_reserved(device)), total

    def get_device_properties(device: Any = None) -> _Smaller:
        return _Smaller(properties(device), total)

    with mock.patch.multiple(torch.cuda, mem_get_info=mem_get_info, get_device_properties=get_device_properties):
        yield


class _Smaller:
    """A GPU's properties but for its size."""

    def __init__(self, properties: Any, total_memory: int) -> None:
        self._properties, self.total_memory = properties, total_memory

    def __getattr__(self, name: str) -> Any:
        return getattr(self._properties, name)
