"""The estimate against peaks measured on an H100 (torch 2.11, diffusers 0.42.1, fp16, no text encoder, 3 steps)."""

from __future__ import annotations

import pytest

from diffusers_turbo.planning.memory import MARGIN, estimate_memory
from diffusers_turbo.planning.options import (
    ChannelsLast,
    FusedQKV,
    GroupOffload,
    HalfPrecision,
    ModelOffload,
    NaiveAttention,
    SDPAAttention,
    SequentialOffload,
    SlicedAttention,
    VAESlicing,
    VAETiling,
)
from diffusers_turbo.planning.units import MIB
from tests.planning.architectures import facts_of

SDPA = SDPAAttention()
TILES = VAETiling(tile_size=512)
LEAVES = GroupOffload(offload_type="leaf_level", use_stream=True)
BLOCKS = GroupOffload(num_blocks_per_group=1)

# (architecture, pixels, batch, switches, measured MiB)
MEASURED = [
    ("sd15", 512, 1, [NaiveAttention()], 2936),
    ("sd15", 512, 1, [SDPA], 2464),
    ("sd15", 512, 1, [SDPA, ChannelsLast()], 2300),
    ("sd15", 512, 1, [SDPA, ModelOffload()], 1816),
    ("sd15", 512, 1, [SDPA, BLOCKS], 1120),
    ("sd15", 512, 1, [SDPA, LEAVES], 644),
    ("sd15", 512, 1, [SDPA, SequentialOffload()], 644),
    ("sd15", 1024, 1, [NaiveAttention()], 18458),
    ("sd15", 1024, 1, [SDPA], 4288),
    ("sd15", 1024, 1, [SDPA, TILES], 2470),
    ("sd15", 1024, 1, [SDPA, TILES, ModelOffload()], 2207),
    ("sd15", 2048, 1, [SDPA], 11587),
    ("sd15", 2048, 1, [SDPA, TILES], 3937),
    ("sd15", 512, 8, [SDPA], 5956),
    ("sd15", 512, 8, [SDPA, VAESlicing()], 2899),
    ("sdxl", 1024, 1, [NaiveAttention()], 10241),
    ("sdxl", 1024, 1, [SDPA], 10243),
    ("sdxl", 1024, 1, [SDPA, TILES], 6590),
    ("sdxl", 1024, 1, [SDPA, TILES, ModelOffload()], 5359),
    ("sdxl", 1024, 1, [SDPA, TILES, SequentialOffload()], 1267),
]


@pytest.mark.parametrize(("name", "side", "batch_size", "switches", "measured"), MEASURED)
def test_the_estimate_is_within_six_percent_of_every_measured_peak(name, side, batch_size, switches, measured):
    estimate = estimate_memory(facts_of(name), side, side, batch_size, switches)
    assert estimate.peak_bytes / MIB == pytest.approx(measured, rel=0.06)
    assert estimate.needed_bytes / MIB >= measured
    assert estimate.margin == MARGIN


def _peak(switches, side=1024, batch_size=1, name="sd15", dtype="float16"):
    return estimate_memory(facts_of(name, dtype), side, side, batch_size, switches).peak_bytes


def test_stages_come_with_what_makes_them_up():
    estimate = estimate_memory(facts_of("sdxl"), 1024, 1024)
    assert [stage.stage for stage in estimate.stages] == ["encode", "denoise", "decode"]
    assert estimate.peak.stage == "decode"
    for stage in estimate.stages:
        assert stage.peak_bytes == stage.weights_bytes + stage.activation_bytes + stage.workspace_bytes
    assert estimate.stage("denoise").weights_bytes == facts_of("sdxl").parameter_bytes


def test_slicing_attention_bounds_the_scores():
    naive = _peak([NaiveAttention()])
    assert _peak([SlicedAttention()]) < naive
    assert _peak([SlicedAttention(slice_size="max")]) < _peak([SlicedAttention()])
    assert _peak([SlicedAttention(max_bytes=2**28)]) <= _peak([SlicedAttention(slice_size="max")])
    assert _peak([SDPAAttention(backend="math")]) == naive


def test_half_precision_halves_weights_and_activations():
    full, half = _peak([], dtype="float32"), _peak([HalfPrecision(dtype="float16")], dtype="float32")
    assert half == pytest.approx(full / 2, rel=0.05)
    assert half == pytest.approx(_peak([]), rel=0.01)


def test_fused_projections_cost_their_copies():
    assert _peak([FusedQKV()]) > _peak([])


def test_transformers_are_estimated_too():
    estimate = estimate_memory(facts_of("pixart", "bfloat16"), 1024, 1024)
    # 217 MiB of live tensors on the meta device for two samples; the coefficient is Flux's, the largest
    assert 217 * MIB <= estimate.stage("denoise").activation_bytes <= 2 * 217 * MIB


def test_more_of_anything_never_needs_less():
    for smaller, larger in ((512, 768), (768, 1024)):
        for switches in ([SDPA], [NaiveAttention()], [SDPA, TILES]):
            assert _peak(switches, side=smaller) <= _peak(switches, side=larger)
    assert _peak([SDPA], batch_size=1) < _peak([SDPA], batch_size=2) < _peak([SDPA], batch_size=4)
