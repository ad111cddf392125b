"""A package without compiled code: its runner computes with the UNet's own modules on the tensors it was bound to.

Like compiled code it reads weights at the addresses of the binding: a change in place is seen, an exchanged weight only
when it is bound anew.
"""

from __future__ import annotations

import copy
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusers_turbo.actions import exporting
from diffusers_turbo.actions.unet_inputs import TensorsOnly
from diffusers_turbo.exported.package import KEY, Package


class FakeRunner:
    """Stands in for `exported.package.Runner`."""

    error = 0.0
    """Relative error that it adds, as wrong code would."""

    def __init__(self, unet: Any) -> None:
        self.module, self.bound = TensorsOnly(unet), {}

    def bind(self, tensors: dict[str, torch.Tensor]) -> None:
        self.bound = {f"unet.{name}": tensor.detach() for name, tensor in tensors.items()}

    def run(self, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        assert all(tensor.is_contiguous() for tensor in inputs), "compiled code does not look at strides"
        assert inputs[1].dtype == torch.float32
        assert inputs[1].shape == (len(inputs[0]),)
        return torch.func.functional_call(self.module, self.bound, inputs) * (1 + self.error)


def use_fakes(monkeypatch: pytest.MonkeyPatch, unet: Any) -> None:
    """Let exports be made without compiling, and loaded as `FakeRunner`s of this UNet."""
    skeleton = copy.deepcopy(unet)
    monkeypatch.setattr(exporting, "export_program", lambda *args, **kwargs: None)
    monkeypatch.setattr(exporting, "write_package", lambda program, card, path: write(path, card.to_json()))
    monkeypatch.setattr(exporting, "crash_when_loaded", lambda path, device: None)
    monkeypatch.setattr(Package, "load", lambda self, device: FakeRunner(copy.deepcopy(skeleton)))


def write(path: Path, card: str | None) -> None:
    """Write a package with a card and no code."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("unet/data/aotinductor/model/x.wrapper_metadata.json", json.dumps({KEY: card} if card else {}))
    path.chmod(0o600)


def change_card(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite a fake package with a changed card."""
    with zipfile.ZipFile(path) as archive:
        (name,) = archive.namelist()
        card = json.loads(json.loads(archive.read(name))[KEY])
    change(card)
    write(path, json.dumps(card))
