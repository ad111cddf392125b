"""Predictions against every peak that was measured: docs/benchmarks/memory-grid-h100.json, stage by stage."""

from __future__ import annotations

import functools
import json
import statistics
from pathlib import Path

import pytest
import torch

from diffusers_turbo import DeviceFacts
from diffusers_turbo.planning.options import make_options
from diffusers_turbo.planning.units import MIB
from diffusers_turbo.prediction.predict import Predictor
from tests.planning.architectures import measured

GRID = json.loads((Path(__file__).parents[2] / "docs" / "benchmarks" / "memory-grid-h100.json").read_text())
# fused projections were copies when they were measured, and are slices since
ROWS = {name: row for name, row in GRID["rows"].items() if "stages" in row and "fuse_qkv_projections" not in name}

# of a stage: weights that stream are a few MiB, beside which what libraries allocate once counts
FEW_BYTES = 32 * MIB


@functools.cache
def _predictor(architecture, dtype):
    pipe = measured(architecture, getattr(torch, dtype), text_encoders=True)
    return Predictor(pipe, device=DeviceFacts.card("H100"))


@functools.cache
def _predicted(name):
    row = ROWS[name]
    return _predictor(row["architecture"], row["dtype"])(
        height=row["side"],
        width=row["side"],
        batch_size=row["batch_size"],
        options=[make_options(action, **arguments) for action, arguments in row["switches"]],
    )


def _peak(stages, kind="allocated"):
    return max(stage[kind] for stage in stages.values())


def _error(name):
    return _predicted(name).peak_bytes / _peak(ROWS[name]["stages"]) - 1


@pytest.mark.parametrize("name", ROWS)
def test_the_prediction_agrees_with_every_measured_peak(name):
    made, stages = _predicted(name), ROWS[name]["stages"]
    assert not any(stage.estimated for stage in made.stages), made.notes
    assert -0.005 <= _error(name) <= 0.01
    assert made.needed_bytes >= _peak(stages)
    for stage in made.stages:
        over = stage.allocated_bytes - stages[stage.stage]["allocated"]
        assert -0.005 * stages[stage.stage]["allocated"] <= over <= max(0.01 * made.peak_bytes, FEW_BYTES)


def test_there_are_enough_cells_and_half_are_met_within_a_third_of_a_percent():
    assert len(ROWS) >= 60
    assert statistics.median(abs(_error(name)) for name in ROWS) < 0.0033


def test_what_the_allocator_reserves():
    """Accelerate's sequential offload gives segments back that the replay keeps."""
    errors = {
        name: _predicted(name).reserved_bytes / _peak(row["stages"], "reserved") - 1
        for name, row in ROWS.items()
        if "sequential" not in name
    }
    assert statistics.median(map(abs, errors.values())) < 0.03
    assert sum(abs(error) <= 0.08 for error in errors.values()) / len(errors) >= 0.92
