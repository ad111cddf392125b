"""Planning decides from facts: its modules import neither torch nor diffusers, not even when they are called."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import diffusers_turbo.planning

MODULES = sorted(Path(diffusers_turbo.planning.__file__).parent.glob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_no_planning_module_imports_a_device_or_a_pipeline_library(path):
    imported = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            imported.add("." * node.level + (node.module or ""))
    roots = {name.split(".")[0] for name in imported if not name.startswith(".")}
    assert not roots & {"torch", "diffusers", "accelerate", "transformers", "xformers", "triton"}
    # what it knows of facts are their types, but for the one door that reads a pipeline for the caller
    own = {name for name in imported if name.startswith("..")}
    assert own <= {"..errors", "..facts.device", "..facts.pipeline", "..facts.components"}
