"""Processes of their own for `simulated_cards.py`, forked from one that has imported everything but leaves the GPU be.

CUDA that was started there would not work in them, and some imports start it (torchao's): to be imported before all
else, it hides the GPU until the fork.
"""

# ruff: noqa: E402
from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable
from typing import Any

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
