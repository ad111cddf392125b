"""Pipelines under a fake export."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from diffusers_turbo import turbo
from tests import tiny
from tests.exported.fake import FakeRunner, use_fakes


@pytest.fixture(scope="session")
def package(tmp_path_factory):
    """The bytes of a fake export of the tiny pipeline's UNet."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        pipe = turbo(tiny.sd())
        use_fakes(monkeypatch, pipe.unet)
        return pipe.export_unet(tmp_path_factory.mktemp("export") / "unet.pt2").read_bytes()


class Twins:
    """Two equal pipelines, `ours` with a fake export at `path` that is not loaded yet, and `plain`."""

    def __init__(self, ours: Any, path: Path) -> None:
        self.ours, self.path = ours, path

    @cached_property
    def plain(self) -> Any:
        return tiny.sd()


@pytest.fixture
def twins(package, monkeypatch, tmp_path):
    """A fresh `Twins`."""
    ours = turbo(tiny.sd())
    use_fakes(monkeypatch, ours.unet)
    monkeypatch.setattr(FakeRunner, "error", 0.0)
    path = tmp_path / "unet.pt2"
    path.write_bytes(package)
    path.chmod(0o600)
    return Twins(ours, path)
