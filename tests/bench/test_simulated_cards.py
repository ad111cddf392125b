"""The script that simulates small cards runs on a CPU, and makes of its rows what they say."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from diffusers_turbo.errors import MissingPackageError

SCRIPT = Path(__file__).parents[2] / "docs" / "benchmarks" / "simulated_cards.py"
TILED = [f"{place}, tiles" for place in ("resident", "model offload", "block offload", "leaf offload")]
PEERS = ["mmgp", "diffusers-mm"]
SECONDS = {"resident": 1.0, "model offload": 2.0, "leaf offload": 4.0}


@pytest.fixture
def script(monkeypatch):
    for name in ("CUDA_VISIBLE_DEVICES", "PYTORCH_NVML_BASED_CUDA_CHECK", "XFORMERS_FORCE_DISABLE_TRITON"):
        monkeypatch.setenv(name, "1")  # the script sets them, too, and here they do not stay
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec = importlib.util.spec_from_file_location("simulated_cards", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def row(seconds=None, gib=0.0, **more):
    timed = {} if seconds is None else {"median_s": seconds}
    return {**timed, "peak_allocated_bytes": int(gib * 2**30), **more}


def ours(seconds=None, gib=0.0, **more):
    return row(seconds, gib, **{"steps": {}, "exact": True, "fallbacks": [], "predicted_bytes": 2**30, **more})


@pytest.mark.slow
def test_the_tiny_model_runs_and_is_not_run_again(tmp_path):
    results = tmp_path / "cards.json"
    command = [sys.executable, str(SCRIPT), str(results), "--tiny", "--rounds", "1", "--budgets", "1"]
    command += ["--without", "model offload", "block offload", "leaf offload", *TILED, *PEERS]

    def run(*more):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([*command, *more], env=environment, capture_output=True, text=True, check=True)
        return done.stdout, json.loads(results.read_text())

    printed, data = run("--caps", "--seconds", "200")
    assert set(data["rivals"]["emoji"]) == {"sequential offload", "sequential offload, tiles"}
    assert [name for name in data["caps"] if name.endswith("exact")] == [
        f"emoji {cap} auto_optimize exact" for cap in ("0.20", "0.10")
    ]
    assert all(found["finite"] for found in data["caps"].values())
    printed, data = run()
    assert len(data["rivals"]["emoji"]) == 3
    assert data["cells"]["emoji 1"]["ours"]["exact"]
    assert "| emoji | 1 GB |" in printed
    assert printed.count("s in all:") == 3
    assert "\n1 cells: " in printed
    assert "mmgp" not in printed
    # into the cells that are there, each with the reason why it cannot run
    command[command.index("--without") :] = ["--ways", *PEERS]
    printed, data = run()
    assert printed.count("s in all:") == 2
    for name in PEERS:
        reason = data["rivals"]["emoji"][name]["failed"]
        assert f"peer {name}: found" in reason
        assert data["cells"]["emoji 1"]["peers"][name] == {"failed": f"uncapped, too: {reason}"}
        assert f"\n{name}: draws in 0 of 1 cells" in printed


def test_what_ends_a_process_is_a_result():
    # in a process of its own, since one with threads must not be forked
    code = f"""
import importlib.util, json, os, sys, time
spec = importlib.util.spec_from_file_location("simulated_cards", {str(SCRIPT)!r})
script = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)
works = [lambda: {{"made": 1}}, lambda: 1 / 0, lambda: os._exit(3), lambda: time.sleep(60)]
print(json.dumps([script.apart(work, 2) for work in works]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    made, raised, gone, slow = json.loads(done.stdout.strip().splitlines()[-1])
    assert made == {"made": 1}
    assert raised == {"failed": "ZeroDivisionError: division by zero"}
    assert gone == {"failed": "exit status 3"}
    assert slow == {"failed": "took longer than 2 s"}


def test_rivals_are_tried_by_their_speed(script):
    rivals = {"leaf offload": row(4.0, 1), "model offload": row(2.0, 2), "block offload": row(failed="x")}
    rivals["mmgp"] = row(1.0, 1)  # goes by the budget, so that its peak without one does not choose it
    assert script.fitting(rivals, 2**31) == ["model offload", "leaf offload"]
    assert script.fitting(rivals, 2**30) == ["leaf offload"]
    assert script.fitting(rivals, 1) == []


@pytest.mark.parametrize(
    ("cell", "same"),
    [
        ({"rival_name": "resident", "ours": ours(1.0, unrestricted=True)}, True),
        ({"rival_name": "resident", "ours": ours(1.0, unrestricted=False)}, False),
        ({"rival_name": "resident", "ours": ours(unrestricted=True, out_of_memory="x")}, False),
        ({"rival_name": "resident", "ours": row(failed="x")}, False),
        ({"rival_name": "leaf offload", "ours": ours(1.0, unrestricted=True)}, False),
        ({"rival_name": None, "ours": ours(1.0, unrestricted=True)}, False),
        ({"same_as": "sd 4"}, False),
        ({}, False),
    ],
)
def test_larger_budgets_are_the_same_once_nothing_is_gained(script, cell, same):
    assert script.has_room(cell, {name: row(seconds, 1) for name, seconds in SECONDS.items()}) is same


def test_the_table_counts_its_cells(script):
    def cell(name, mine):
        return {"rival_name": name, "rival": name and row(SECONDS[name], 1), "ours": mine}

    tiles = {"steps": {"enable_vae_tiling": {}, "enable_partial_offload": {}}, "exact": False}
    cells = {
        "sd 1": cell(None, ours(out_of_memory="x")),
        "sd 1.5": cell(None, ours(9.0, **tiles)),
        "sd 2": cell("leaf offload", ours(4.2, fallbacks=["out of memory in unet"])),
        "sd 3": cell("model offload", ours(2.6)),
        "sd 4": cell("resident", ours(0.5, 1.5)),
        "sd 6": {"same_as": "sd 4"},
    }
    lines = script.budget_table(cells)
    assert lines[2] == "| sd | 1 GB | none fits | - | resident | - | out of memory | - | 1.00 | - |"
    assert "vae_tiling + partial_offload | lossy (tiles) | 9.00" in lines[3]
    assert "exact, after running out of memory | 4.20 | 1.05" in lines[4]
    assert lines[6] == "| sd | 4 GB | resident | 1.00 | resident | exact | 0.50 | 0.50 | 1.00 | 1.50 |"
    assert "as with 4 GB" in lines[7]
    assert lines[-1] == (
        "5 cells: ours ahead in 1, behind by up to 10 % in 1, by more in 1, the only one that fits in 1, out of memory "
        "or failed in 1"
    )


def test_other_packages_are_counted_in_each_cell(script):
    def cell(mine, **peers):
        return {"rival_name": None, "rival": None, "ours": mine, "peers": peers}

    cells = {
        "sd 1": cell(ours(out_of_memory="x"), mmgp=row(9.0)),
        "sd 2": cell(ours(2.0), mmgp=row(8.0)),
        "sd 3": cell(ours(2.0), mmgp=row(out_of_memory="x")),
        "sd 4": {**cell(ours(1.0), mmgp=row(0.5)), "peers": {"mmgp": row(0.5), "diffusers-mm": row(failed="x")}},
        "sd 6": {"same_as": "sd 4", "peers": {"mmgp": row(7.0)}},
        "sd 8": {"same_as": "sd 4"},
    }
    head, _, *lines, first, second = script.budget_table(cells)
    assert head.endswith("| measured | mmgp | diffusers-mm |")
    assert [line.split(" | ")[-2:] for line in lines[:6]] == [
        ["9.00", "- |"],
        ["8.00", "- |"],
        ["out of memory", "- |"],
        ["0.50", "failed |"],
        ["7.00", "- |"],
        ["-", "- |"],
    ]
    assert first == "mmgp: draws in 4 of 5 cells, ours ahead of it in 2 of these"
    assert second == "diffusers-mm: draws in 0 of 1 cells, ours ahead of it in 0 of these"


def test_results_without_other_packages_are_still_read(script):
    data = json.loads((SCRIPT.parent / "simulated-cards-h100.json").read_text())
    old = {key: {part: found for part, found in cell.items() if part != "peers"} for key, cell in data["cells"].items()}
    head, _, *lines = script.budget_table(old)
    assert head.endswith("| GiB predicted | measured |")
    assert len(lines) == len(old) + 2
    assert lines[-1].endswith("out of memory or failed in 1")


def test_a_package_that_was_missing_is_tried_again(script):
    missing = script.in_one_line(MissingPackageError("peer mmgp: found mmgp not installed"), 300)
    assert not script.settled(None)
    assert not script.settled({"failed": missing})
    assert not script.settled({"failed": f"uncapped, too: {missing}"})
    assert script.settled({"failed": "RuntimeError: x"})
    assert script.settled(row(1.0))


def test_a_smaller_card_answers_until_the_end(script, monkeypatch):
    properties = SimpleNamespace(total_memory=2**37, name="a large GPU")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device=None: 2**28)
    before = torch.cuda.mem_get_info, torch.cuda.get_device_properties
    with script.as_card(2**30):
        assert torch.cuda.mem_get_info() == torch.cuda.mem_get_info("cuda") == (2**30 - 2**28, 2**30)
        found = torch.cuda.get_device_properties(0)
        assert (found.total_memory, found.name) == (2**30, "a large GPU")
    assert (torch.cuda.mem_get_info, torch.cuda.get_device_properties) == before


@pytest.mark.parametrize(("name", "told"), [("mmgp", 2**30), ("diffusers-mm", None)])
def test_other_packages_see_the_capped_card(script, monkeypatch, name, told):
    seen = []

    def use(pipe, device, budget_bytes):
        seen.append((device.type, budget_bytes, torch.cuda.mem_get_info()))
        pipe.mm = SimpleNamespace(applied_strategy="group_offload")

    monkeypatch.setitem(script.OFFLOADERS, name, replace(script.OFFLOADERS[name], modules=(), use=use))
    monkeypatch.setattr(script, "set_scheduler", lambda *_: None)
    for what, answer in {
        "is_available": True,
        "mem_get_info": (2**36, 2**37),
        "memory_reserved": 0,
        "max_memory_allocated": 2**29,
        "max_memory_reserved": 2**29,
        "reset_peak_memory_stats": None,
        "set_per_process_memory_fraction": None,
    }.items():
        monkeypatch.setattr(torch.cuda, what, lambda *_, answer=answer: answer)

    class Pipe:
        def __call__(self, *_, **__):
            seen.append(torch.cuda.mem_get_info())
            return SimpleNamespace(images=torch.zeros(1))

    job, way = script.JOBS["sd15-512"], script.Way(name=name, cap=2**30)
    found = script.measure(Pipe(), job, way)
    assert seen == [("cuda", told, (2**30, 2**30)), *[(2**30, 2**30)] * 3]  # while it draws, too
    assert torch.cuda.mem_get_info() == (2**36, 2**37)
    assert (found["told_bytes"], found["seen_bytes"], found["strategy"]) == (told, 2**30, "group_offload")
    assert found["finite"]
    assert "seen_bytes" not in script.measure(Pipe(), job, replace(way, cap=None))
