"""TF32 is in force during this pipeline's calls only; whatever the call does, the flags come back as they were."""

from __future__ import annotations

import threading

import pytest
import torch

from diffusers_turbo import turbo
from tests import tiny
from tests.state import global_flags


def flags() -> tuple[str, str]:
    return torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision


def seen_during_a_call(pipe) -> list[tuple[str, str]]:
    """Make a picture and return the flags at each step."""
    seen: list[tuple[str, str]] = []

    def look(pipe, step, timestep, tensors):
        seen.append(flags())
        return tensors

    tiny.picture(pipe, callback_on_step_end=look)
    return seen


def test_in_force_in_calls_only():
    pipe, before = turbo(tiny.sd()), global_flags()
    pipe.enable_tf32()
    assert global_flags() == before
    assert set(seen_during_a_call(pipe)) == {("tf32", "tf32")}
    assert global_flags() == before
    # the older names can still be read, which they refuse once the newer ones were left set
    assert torch.backends.cuda.matmul.allow_tf32 is False
    pipe.disable_tf32()
    assert ("tf32", "tf32") not in seen_during_a_call(pipe)


def test_a_setting_of_the_users_own_comes_back():
    matmul = torch.backends.cuda.matmul
    found = matmul.fp32_precision
    pipe = turbo(tiny.sd())
    pipe.enable_tf32()
    try:
        matmul.fp32_precision = "ieee"
        tiny.picture(pipe)
        assert matmul.fp32_precision == "ieee"
    finally:
        matmul.fp32_precision = found


def test_a_failing_call_restores_the_flags():
    pipe, before = turbo(tiny.sd()), global_flags()
    pipe.enable_tf32()
    with pytest.raises(ValueError, match="Provide either `prompt`"):
        pipe()
    assert global_flags() == before


def test_two_threads_share_one_setting():
    before = global_flags()
    pipes = [turbo(tiny.sd()) for _ in range(2)]
    for pipe in pipes:
        pipe.enable_tf32()
    seen: list[list[tuple[str, str]]] = []
    threads = [threading.Thread(target=lambda p=pipe: seen.append(seen_during_a_call(p))) for pipe in pipes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {pair for run in seen for pair in run} == {("tf32", "tf32")}
    assert len(seen) == 2
    assert global_flags() == before
