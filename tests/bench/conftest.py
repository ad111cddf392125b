"""Fixtures of whole runs: the tiny model in a folder, records of what a run called."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

from diffusers_turbo.bench.results import Row
from diffusers_turbo.bench.running import Contender
from diffusers_turbo.verification.check import Yardstick
from tests import tiny
from tests.bench.runs import Calls, Log


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> str:
    """A folder with the tiny pipeline."""
    folder = tmp_path_factory.mktemp("model")
    tiny.sd().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def log(monkeypatch) -> Log:
    """Record loading, first pictures, rounds and comparisons."""
    log = Log()

    def record(owner: type, method: str, name: str) -> None:
        original = getattr(owner, method)

        @functools.wraps(original)
        def recorded(self: Any, *args: Any, **kwargs: Any) -> Any:
            case, batch = (args[1].name, None) if method == "__init__" else (None, None)
            if args and isinstance(args[0], Row):
                case, batch = self.case.name, args[0].batch
            log.add(name, *(item for item in (case, batch) if item is not None))
            result = original(self, *args, **kwargs)
            if method == "round":
                log.seconds.append(result)
            return result

        monkeypatch.setattr(owner, method, recorded)

    record(Contender, "__init__", "load")
    record(Contender, "first", "first")
    record(Contender, "round", "round")
    record(Yardstick, "measure", "compare")
    return log


@pytest.fixture
def calls(monkeypatch) -> Calls:
    calls, original = Calls(), StableDiffusionPipeline.__call__

    @functools.wraps(original)
    def recorded(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.arguments.append(kwargs)
        calls.autocast.append(torch.is_autocast_enabled("cpu"))
        calls.schedulers.append(type(self.scheduler).__name__)
        output = original(self, *args, **kwargs)
        calls.images.append(output.images)
        return output

    monkeypatch.setattr(StableDiffusionPipeline, "__call__", recorded)
    return calls
