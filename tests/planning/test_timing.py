"""What memory switches cost in time: against figures they were not made from, and in the plan's choice."""

from __future__ import annotations

import json
import statistics
from itertools import pairwise
from pathlib import Path

import pytest

from diffusers_turbo import DeviceFacts, Plan, plan
from diffusers_turbo.planning import gains
from diffusers_turbo.planning.fitting import judge_memory
from diffusers_turbo.planning.ladder import Estimated, Rung, cheapest
from diffusers_turbo.planning.options import (
    DenoiserSlicing,
    GroupOffload,
    ModelOffload,
    PartialOffload,
    SequentialOffload,
    VAEExactTiling,
    VAETiling,
)
from diffusers_turbo.planning.request import Request, settle
from diffusers_turbo.planning.timing import (
    OFFLOAD_RATES,
    SHARE_OF_ANY_CALL,
    added_seconds,
    denoiser_calls,
    missed_seconds,
    slicing_seconds,
    tiling_seconds,
)
from tests.planning.architectures import facts_of

OFFLOADS = (ModelOffload(), GroupOffload(offload_type="leaf_level", use_stream=True), SequentialOffload())


@pytest.mark.parametrize("option", OFFLOADS)
def test_the_measured_seconds_come_out_again(option):
    measured = gains.OFFLOAD_SECONDS
    found = added_seconds(facts_of("sd15"), [option], gains.OFFLOAD_STEPS)
    assert found == pytest.approx(measured[option.action] - measured["none"], rel=0.01)


@pytest.mark.parametrize("option", OFFLOADS[::2])
def test_another_model_is_predicted_within_a_tenth(option):
    measured = gains.SDXL_OFFLOAD_SECONDS
    found = added_seconds(facts_of("sdxl"), [option], gains.OFFLOAD_STEPS)
    assert found == pytest.approx(measured[option.action] - measured["none"], rel=0.1)


def test_streaming_costs_each_step_and_a_model_s_move_each_call():
    facts = facts_of("sdxl")
    model, group, sequential = ([added_seconds(facts, [option], steps) for steps in (3, 30)] for option in OFFLOADS)
    assert model[0] == model[1]
    assert group[1] > 9 * group[0]
    assert sequential[1] / group[1] == pytest.approx(
        OFFLOAD_RATES[GroupOffload.action] / OFFLOAD_RATES[SequentialOffload.action]
    )
    assert added_seconds(facts, []) == added_seconds(facts, [VAETiling(tile_size=512)]) == 0


def test_what_stays_of_the_denoiser_is_not_copied_at_each_step():
    facts = facts_of("sdxl")
    whole = facts.denoiser_facts.parameter_bytes
    shares = [
        added_seconds(facts, [PartialOffload(resident_bytes=whole * eighths // 8)]) for eighths in (0, 2, 4, 6, 8)
    ]
    steps = {round(a - b, 3) for a, b in pairwise(shares)}
    assert len(steps) == 1, "time grows evenly as less stays"
    assert shares[0] < added_seconds(facts, [OFFLOADS[1]]) / 3
    leaves = added_seconds(facts, [PartialOffload(resident_bytes=None, denoiser_leaves=True)])
    assert shares[-1] < leaves < added_seconds(facts, [ModelOffload()]) / 5
    slower = added_seconds(facts, [PartialOffload(resident_bytes=None, denoiser_leaves=True, pin_memory=False)])
    assert slower == pytest.approx(leaves * gains.COPY_RATES["page-locked"] / gains.COPY_RATES["ordinary"])


def test_exact_tiles_add_what_was_measured():
    measured = json.loads((BENCHMARKS / "decodes-h100.json").read_text())["jobs"]
    names = {(256, "device"): "exact tiles", (256, "host"): "exact tiles, on the host"}
    names[128, "host"] = "exact tiles of 128, on the host"
    for dtype, arch in (("float32", "sdxl"), ("float16", "sd15")):
        facts, rows = facts_of(arch), measured[f"1024, {dtype}, with fused kernels"]
        for (tile, where), name in names.items():
            tiles = VAEExactTiling(tile_size=tile, hold_on=where)
            added = statistics.median(rows[name]["seconds"]) - statistics.median(rows["whole"]["seconds"])
            assert tiling_seconds(facts, [tiles], 1024**2) == pytest.approx(added, abs=5e-4)
            assert tiling_seconds(facts, [tiles], 2 * 1024**2) == pytest.approx(2 * added, abs=1e-3)
    # another size than the one the figures are from: in proportion to its pixels
    for arch, job, pixels, within in (
        ("sd15", "512, float16, with fused kernels", 512**2, {"abs": 0.01}),
        ("sdxl", "2048, float32, with fused kernels", 2048**2, {"rel": 0.15}),
    ):
        rows = measured[job]
        for (tile, where), name in names.items():
            added = rows[name]["median_s"] - rows["whole"]["median_s"]
            predicted = tiling_seconds(facts_of(arch), [VAEExactTiling(tile_size=tile, hold_on=where)], pixels)
            assert predicted == pytest.approx(added, **within)
    assert tiling_seconds(facts, [], 1) == tiling_seconds(facts, [VAETiling(tile_size=256)], 1) == 0
    moving, tiles = added_seconds(facts, [ModelOffload()]), VAEExactTiling()
    added = tiling_seconds(facts, [tiles], facts.default_height * facts.default_width)
    assert added_seconds(facts, [ModelOffload(), tiles]) == pytest.approx(moving + added)


def test_a_slice_costs_a_call_and_another_passage_of_what_is_streamed():
    facts, slices = facts_of("sd15"), DenoiserSlicing(slice_size=2)
    assert denoiser_calls(facts, [], 8) == denoiser_calls(facts, [slices], 1) == 1
    assert denoiser_calls(facts, [slices], 8) == 8
    streamed = PartialOffload(resident_bytes=0)
    once, often = (added_seconds(facts, [streamed, *more], 50, batch_size=8) for more in ((), (slices,)))
    calls = slicing_seconds(facts, [slices], 50, 8)
    assert calls == pytest.approx(7 * 50 * SHARE_OF_ANY_CALL * 0.302 / 50)
    assert often - calls == pytest.approx(8 * once, rel=0.1)
    # a model of another size that no tier was measured for: by its weights
    pixart = facts_of("pixart")
    of_weights = pixart.denoiser_facts.parameter_bytes / gains.OFFLOAD_DENOISER_BYTES
    assert slicing_seconds(pixart, [slices], 50, 8) == pytest.approx(calls * of_weights)


def test_what_any_call_costs_is_from_measured_batches():
    tiers = BENCHMARKS / "tiers-h100"
    for batch, name in ((1, "sd15"), (2, "sd15-batch2"), (4, "sd15-batch4")):
        rows = json.loads((tiers / name / "results.json").read_text())["rows"]
        (row,) = (row for row in rows if row["case"] == "tier-instant")
        assert row["batch"] == batch
        assert gains.INSTANT_BATCH_SECONDS[batch] == pytest.approx(statistics.median(row["seconds"]), abs=2e-3)
    assert 0.3 < SHARE_OF_ANY_CALL < 0.4


BENCHMARKS = Path(__file__).parents[2] / "docs" / "benchmarks"
MEASURED = BENCHMARKS / "partial-offload-h100"
WAYS = {
    "stock": ([], False),
    "graphs-stay": ([PartialOffload(resident_bytes=None)], True),
    "graphs-leave": ([PartialOffload(resident_bytes=None, denoiser_leaves=True)], True),
    "leaves-all": ([PartialOffload(resident_bytes=None, denoiser_leaves=True)], False),
    "stays-1": ([PartialOffload(resident_bytes=2**30)], False),
    "stays-0": ([PartialOffload(resident_bytes=0)], False),
    "model-offload": ([ModelOffload()], False),
    "group-offload": ([OFFLOADS[1]], False),
}
"""Cases of docs/benchmarks/partial-offload.toml: what they move, and whether they have graphs."""


@pytest.mark.parametrize("arch", ["sd15", "sdxl"])
def test_ways_come_in_the_order_that_was_measured(arch):
    """Of any two that lie more than a third apart, the one that is said to add less is the faster one."""
    found = json.loads((MEASURED / arch / "results.json").read_text())
    facts, steps = facts_of(arch), found["job"]["steps"]
    measured = {row["case"]: statistics.median(row["seconds"]) for row in found["rows"] if row["case"] in WAYS}
    predicted = {
        name: added_seconds(facts, options, steps) + (0 if graphs else missed_seconds(facts, steps))
        for name, (options, graphs) in WAYS.items()
    }
    pairs = [(a, b) for a in measured for b in measured if measured[b] > 4 / 3 * measured[a]]
    assert len(pairs) >= 8
    assert [(a, b) for a, b in pairs if predicted[a] >= predicted[b]] == []


def way(needed, seconds, *options):
    return Estimated(rung=Rung(options=options), needed_bytes=needed, added_seconds=seconds)


def test_the_way_that_fits_and_costs_least_is_chosen_and_exact_ones_first():
    plain, slow, fast = way(10, 0.0), way(4, 9.0, SequentialOffload()), way(6, 2.0, ModelOffload())
    tiled = way(5, 0.0, VAETiling(tile_size=512))
    tried = [plain, slow, fast, tiled]
    assert cheapest(tried, 12) is plain
    assert cheapest(tried, 8) is fast
    assert cheapest(tried, 5) is slow
    assert cheapest([plain, fast, tiled], 5) is tiled
    large, small = way(5, 3.0, VAETiling(tile_size=512)), way(3, 2.0, VAETiling(tile_size=256))
    assert cheapest([plain, large, small], 5) is large
    assert cheapest([plain, way(5, 4.1, VAETiling(tile_size=512)), small], 5) is small
    assert cheapest(tried, 3) is slow
    assert cheapest(tried, None) is plain


def test_a_plan_shows_the_ways_that_it_weighed():
    tight, roomy = (plan(facts_of("sdxl"), DeviceFacts.card("RTX 3060"), vram_budget=size) for size in ("6GB", None))
    fitting = [item for item in tight.alternatives if item.fits and item.exact]
    taken = min(fitting, key=lambda item: item.added_seconds)
    assert [step.action for step in tight.steps if "offload" in step.action] == ["enable_partial_offload"]
    assert taken.switches == ("enable_partial_offload(resident_bytes=None, denoiser_leaves=True)",)
    assert taken.needed_bytes == tight.after.needed_bytes
    assert taken.peak_bytes < taken.needed_bytes
    text = tight.explain()
    assert f"  - {taken.name}: 5.66 GiB, +{taken.added_seconds:.1f} s, fits\n" in text
    assert taken.name.endswith(", denoiser_leaves=True), with graphs")
    assert "enable_model_cpu_offload" not in text.partition("Ways to fit")[2].partition("Notes")[0]  # nor faster
    assert "LOSSY" not in text.partition("Ways to fit")[2].partition("Notes")[0]  # tiles alone are not faster
    assert "  - enable_sequential_cpu_offload()" not in text.partition("Ways to fit")[2].partition("Notes")[0]
    assert len({item.name for item in tight.alternatives}) == len(tight.alternatives)
    assert Plan.from_json(tight.to_json()) == tight
    assert all(
        item.added_seconds == pytest.approx(taken.added_seconds + 1.687)
        for item in tight.alternatives
        if item.lean and item.switches == taken.switches
    )
    assert roomy.alternatives[0].fits
    assert "Ways to fit" not in roomy.explain()


def test_steps_decide_what_streaming_costs():
    few, many = (plan(facts_of("sd15"), DeviceFacts.card("RTX 3060"), vram_budget="1.5GB", steps=n) for n in (2, 30))
    seconds = [
        min(item.added_seconds for item in made.alternatives if item.fits and item.exact) for made in (few, many)
    ]
    assert seconds[1] > 5 * seconds[0]
    assert "to a call of 2 steps" in few.explain()
    assert "to a call of 30 steps" in many.explain()
    assert many == plan(facts_of("sd15"), DeviceFacts.card("RTX 3060"), vram_budget="1.5GB")


def test_what_would_fit_and_is_slower_is_not_said_to_be_too_large():
    situation = settle(facts_of("sdxl"), DeviceFacts.card("RTX 3060"), Request(vram_budget=5))
    tried = [way(10, 0.0), way(6, 2.0, ModelOffload()), way(4, 9.0, SequentialOffload()), way(5, 3.0, GroupOffload())]
    verdicts = judge_memory(situation, tried, cheapest(tried, 5))
    reasons = {item.options.action: item.reason for item in verdicts if not item.taken}
    assert "It would fit with 0 MiB of 0 MiB usable, but adds up to 9.0 s" in reasons[SequentialOffload.action]
    assert "where the plan adds 3.0" in reasons[SequentialOffload.action]
    assert "It is not enough: " in reasons[ModelOffload.action]
