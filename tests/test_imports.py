"""Importing is light, needs no optional package, touches no GPU; and the rooms of the house look only one way."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import diffusers_turbo

PACKAGE = Path(diffusers_turbo.__file__).parent

NAMES = "turbo, auto_optimize, probe, plan, predict_memory, DeviceFacts, Plan, TurboMixin, TurboError"

BLOCK_OPTIONAL = """
import importlib.abc, sys
OPTIONAL = {"xformers", "peft", "triton", "torchao", "rich", "typer", "matplotlib", "torchmetrics", "flip_evaluator"}
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in OPTIONAL:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
"""


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_all_is_sorted_and_complete():
    assert diffusers_turbo.__all__ == sorted(diffusers_turbo.__all__)
    assert set(NAMES.split(", ")) == set(diffusers_turbo.__all__)


def test_import_needs_no_optional_package_and_makes_no_cuda_context():
    code = f"{BLOCK_OPTIONAL}\nfrom diffusers_turbo import {NAMES}\nimport torch; print(torch.cuda.is_initialized())"
    assert run(code).strip() == "False"


def test_import_leaves_the_compiler_alone():
    """torch._dynamo takes seconds to import, and imports Triton; diffusers' top level does not need it either."""
    assert (
        run("import diffusers_turbo, sys; print([x for x in ('torch._dynamo', 'triton') if x in sys.modules])")
        == "[]\n"
    )


def test_import_loads_little_beyond_torch_and_diffusers():
    """Counted in modules, since times on a shared machine say nothing: no model, no kernel, no optional package."""
    code = (
        "import sys, torch, diffusers; from diffusers import DiffusionPipeline\n"
        f"before = set(sys.modules)\nfrom diffusers_turbo import {NAMES}\n"
        "print('\\n'.join(sorted(set(sys.modules) - before)))"
    )
    loaded = run(code).split()
    assert [name for name in loaded if name.split(".")[0] in ("xformers", "triton", "peft", "torchvision")] == []
    assert len([name for name in loaded if not name.startswith("diffusers_turbo")]) < 60


# Which rooms each room may look into; the time order is facts -> planning -> actions -> report.
MAY_IMPORT = {
    "errors": set(),
    "modules": set(),
    "parity": set(),
    "report": set(),
    "trusted": {"errors"},
    "facts": {"errors", "modules", "tiling"},
    "planning": {"errors", "facts"},
    "attention": {"errors", "modules"},
    "kernels": {"errors"},
    "fused": {"kernels"},
    "graphs": {"errors", "modules"},
    "compilation": {"errors", "graphs", "modules", "trusted"},
    "exported": {"errors", "facts", "graphs", "trusted"},
    "schedulers": set(),
    "tiling": set(),
    "actions": {
        *("errors", "facts", "planning", "attention", "schedulers", "graphs", "kernels", "fused", "compilation"),
        *("exported", "mixin", "modules", "tiling", "trusted"),
    },
    "copying": {"errors", "actions"},
    # entry verifies, and a verification makes its reference with turbo(), which it imports when it runs
    "verification": {"errors", "facts", "planning", "actions", "copying", "parity", "entry"},
    "looking": {"actions", "report", "verification"},
    "switching": {"actions", "planning"},
    "looping": {"facts", "planning", "switching"},
    "algebra": {"planning", "switching"},
    "easing": {"planning", "switching"},
    "compiling": {"actions", "planning", "switching"},
    "mixin": {"actions", "algebra", "compiling", "copying", "easing", "looking", "looping", "planning"},
    # an architecture to predict for is built by the bench room, imported when one is named
    "prediction": {"actions", "attention", "bench", "errors", "facts", "kernels", "planning", "tiling"},
    "entry": {"actions", "attention", "facts", "mixin", "planning", "prediction", "verification"},
}


def rooms_imported(path: Path) -> set[str]:
    """Rooms of this package that a file imports, absolutely or relatively."""
    package = ("diffusers_turbo", *path.relative_to(PACKAGE).parts[:-1])
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            full = [*base, *(node.module or "").split(".")] if node.module else list(base)
            names = [full] if len(full) > 1 else [[*full, alias.name] for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        else:
            continue
        found |= {name[1] for name in names if len(name) > 1 and name[0] == "diffusers_turbo"}
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_rooms_look_one_way(path: Path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if room not in MAY_IMPORT:
        assert room in ("__init__", "__main__", "cli", "bench", "kernels")
        # what is built on the package: nothing below may look up
        return
    assert rooms_imported(path) - {room} <= MAY_IMPORT[room]


@pytest.mark.parametrize("path", sorted((PACKAGE / "planning").glob("*.py")), ids=lambda path: path.name)
def test_planning_asks_no_device_and_touches_no_pipeline(path: Path):
    text = path.read_text()
    assert "import torch" not in text.replace("if TYPE_CHECKING:\n    import torch", "")
    assert "import diffusers\n" not in text
    assert "from diffusers import" not in text
