"""The collector's thresholds are others only while something may be compiled, and back afterwards."""

from __future__ import annotations

import gc
from threading import Barrier, Thread
from typing import Any

import pytest
import torch
from torch import nn

from diffusers_turbo.compilation.call import WatchedCall
from diffusers_turbo.compilation.garbage import OBJECTS, rarely_collected


class Twice(nn.Module):
    """Not one of torch's own, which it does not compile by themselves."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


@pytest.fixture(autouse=True)
def thresholds():
    before = gc.get_threshold()
    gc.set_threshold(700, 10, 10)
    yield
    gc.set_threshold(*before)


def test_a_compiled_call_collects_rarely():
    seen = []

    def backend(graph: Any, inputs: Any) -> Any:
        seen.append(gc.get_threshold())
        return graph.forward

    call = WatchedCall.of(Twice(), dynamic=False, fullgraph=False, backend=backend)
    call(torch.ones(2))
    assert seen == [(OBJECTS, 10, 10)]
    assert gc.get_threshold() == (700, 10, 10)


def test_thresholds_are_back_after_an_error_and_after_the_last_of_nested_calls():
    with pytest.raises(ValueError, match="inside"), rarely_collected(), rarely_collected():
        raise ValueError("inside")
    assert gc.get_threshold() == (700, 10, 10)
    with rarely_collected():
        with rarely_collected():
            pass
        assert gc.get_threshold()[0] == OBJECTS
    assert gc.get_threshold() == (700, 10, 10)


def test_of_two_threads_the_last_puts_them_back():
    inside, left = Barrier(2), Barrier(2)
    found = []

    def other() -> None:
        with rarely_collected():
            inside.wait(10)
            left.wait(10)
            found.append(gc.get_threshold()[0])

    thread = Thread(target=other)
    with rarely_collected():
        thread.start()
        inside.wait(10)
    left.wait(10)
    thread.join(10)
    assert found == [OBJECTS]
    assert gc.get_threshold() == (700, 10, 10)


@pytest.mark.parametrize("theirs", [(0, 10, 10), (10 * OBJECTS, 10, 10)], ids=["off", "rarer"])
def test_what_the_user_chose_stays(theirs):
    gc.set_threshold(*theirs)
    with rarely_collected():
        assert gc.get_threshold() == theirs
    assert gc.get_threshold() == theirs


def test_thresholds_set_meanwhile_stay():
    with rarely_collected():
        gc.set_threshold(5, 5, 5)
    assert gc.get_threshold() == (5, 5, 5)
