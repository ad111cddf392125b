"""The benchmark's code runs; through the interpreter on tiny shapes, on a GPU on a few real ones."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from diffusers_turbo.kernels import KERNELS

SCRIPT = Path(__file__).parents[3] / "docs" / "benchmarks" / "kernels.py"


def test_the_benchmark_writes_and_prints(tmp_path, capsys, monkeypatch):
    spec = importlib.util.spec_from_file_location("kernels_benchmark", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, spec.name, script)
    spec.loader.exec_module(script)
    script.main([str(tmp_path / "result.json"), "--quick"])
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert {row["kernel"] for row in rows} == set(KERNELS)
    assert {row["way"] for row in rows} == {"kernel", "plain"}
    assert all(row["us"] > 0 for row in rows)
    assert len(capsys.readouterr().out.splitlines()) == len(rows) + 1
