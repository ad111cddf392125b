"""The measured ladder draws what stands in the results of simulated cards."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from diffusers_turbo.errors import InvalidOptionError

BENCHMARKS = Path(__file__).parents[2] / "docs" / "benchmarks"
RESULTS = json.loads((BENCHMARKS / "simulated-cards-h100.json").read_text())
JOBS = ["sd15-512", "sd15-1024", "sdxl-1024"]


@pytest.fixture
def ladder(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("measured_ladder", BENCHMARKS / "measured_ladder.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def results():
    """Results that a test may change."""
    return json.loads(json.dumps(RESULTS))


@pytest.mark.parametrize("job", JOBS)
def test_our_line_goes_through_the_cells_of_the_file(ladder, job):
    line = ladder.read_lines(RESULTS)[job]["auto_optimize"]
    expected, lost = [], []
    for key in sorted(RESULTS["cells"], key=lambda key: float(key.split()[1])):
        if key.startswith(f"{job} "):
            cell = RESULTS["cells"][RESULTS["cells"][key].get("same_as", key)]
            size, ours = float(key.split()[1]), cell["ours"]
            expected += [(size, ours["median_s"])] if "median_s" in ours else []
            lost += [size] if "out_of_memory" in ours else []
    assert line.points == expected
    assert line.lost == lost
    assert not line.everywhere


@pytest.mark.parametrize("job", JOBS)
def test_ways_by_hand_begin_where_their_peak_fits(ladder, job):
    lines = ladder.read_lines(RESULTS)[job]
    peers = {name for cell in RESULTS["cells"].values() for name in cell.get("peers", {})}
    rivals = {name: row for name, row in RESULTS["rivals"][job].items() if "median_s" in row and name not in peers}
    assert lines.keys() - peers == {"auto_optimize", *rivals}
    for name, row in rivals.items():
        (start, seconds), *others = lines[name].points
        assert lines[name].everywhere
        assert not others
        assert seconds == row["median_s"]
        assert bool(lines[name].lossy) == name.endswith(", tiles")
        # the smallest budget whose cap holds the peak, as the script makes caps of budgets
        assert start * 2**30 - RESULTS["context_bytes"] == pytest.approx(row["peak_allocated_bytes"])


def test_what_ran_out_of_memory_under_a_cap_is_marked_there(ladder):
    lines = ladder.read_lines(RESULTS)
    crosses = {
        (*key.split(), name)
        for key, cell in RESULTS["cells"].items()
        for name, row in cell.get("failed_rivals", {}).items()
        if "out_of_memory" in row
    }
    assert crosses  # the file has some
    by_hand = [(job, name, line) for job, found in lines.items() for name, line in found.items() if line.everywhere]
    assert {(job, f"{size:g}", name) for job, name, line in by_hand for size in line.lost} == crosses
    assert all(line.height(size) == line.points[0][1] for _, _, line in by_hand for size in line.lost)


@pytest.mark.parametrize("job", JOBS)
def test_lossy_tiles_are_drawn_where_they_spare_memory(ladder, job):
    lines, rivals = ladder.read_lines(RESULTS)[job], RESULTS["rivals"][job]
    for name in lines:
        plain = rivals.get(name.removesuffix(", tiles"))
        needless = name.endswith(", tiles") and plain["peak_allocated_bytes"] <= rivals[name]["peak_allocated_bytes"]
        assert ladder.spares_nothing(name, lines) == needless


def test_packages_that_go_by_the_budget_are_drawn_by_their_cells(ladder, results):
    results["rivals"]["sd15-512"]["mmgp"] = {"median_s": 1.0, "peak_allocated_bytes": 2**30}
    cells = results["cells"]
    cells["sd15-512 1"]["peers"] = {"mmgp": {"out_of_memory": "x"}}
    cells["sd15-512 4"]["peers"] = {"mmgp": {"median_s": 9.0}}
    cells["sd15-512 6"]["peers"] = {"mmgp": {"median_s": 8.0}}  # the same as 4 for ours, not for it
    line = ladder.read_lines(results)["sd15-512"]["mmgp"]
    assert (line.points, line.lost, line.everywhere) == ([(4.0, 9.0), (6.0, 8.0)], [1.0], False)


def test_lossy_pictures_of_ours_are_told_apart(ladder, results):
    results["cells"]["sd15-512 2"]["ours"]["exact"] = False
    assert ladder.read_lines(results)["sd15-512"]["auto_optimize"].lossy == {2.0}


@pytest.mark.parametrize("data", [{}, {"rivals": {}, "cells": {}, "caps": {"sd15-512 0.45 auto_optimize": {}}}])
def test_a_file_without_cells_is_refused(ladder, tmp_path, data):
    path = tmp_path / "cards.json"
    path.write_text(json.dumps(data))
    with pytest.raises(InvalidOptionError, match=r"measured ladder: found a file without cells.*run it without --caps"):
        ladder.main(path, tmp_path / "ladder.png")
    assert not (tmp_path / "ladder.png").exists()


def test_it_is_drawn(ladder, tmp_path):
    pytest.importorskip("matplotlib")
    ladder.main(BENCHMARKS / "simulated-cards-h100.json", tmp_path / "ladder.svg")
    assert "auto_optimize" in (tmp_path / "ladder.svg").read_text()
