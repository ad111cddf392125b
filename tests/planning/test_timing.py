"""What memory switches cost in time: against figures they were not made from, and in the plan's choice."""

from __future__ import annotations

import pytest

from diffusers_turbo import DeviceFacts, Plan, plan
from diffusers_turbo.planning import gains
from diffusers_turbo.planning.fitting import Estimated, Rung, cheapest
from diffusers_turbo.planning.options import GroupOffload, ModelOffload, SequentialOffload, VAETiling
from diffusers_turbo.planning.timing import OFFLOAD_RATES, added_seconds
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
    assert cheapest(tried, 3) is slow
    assert cheapest(tried, None) is plain


def test_a_plan_shows_the_ways_that_it_weighed():
    tight, roomy = (plan(facts_of("sdxl"), DeviceFacts.card("RTX 3060"), vram_budget=size) for size in ("6GB", None))
    fitting = [item for item in tight.alternatives if item.fits and item.exact]
    taken = min(fitting, key=lambda item: item.added_seconds)
    assert [step.action for step in tight.steps if "offload" in step.action] == ["enable_model_cpu_offload"]
    assert taken.switches == ("enable_model_cpu_offload()",)
    assert taken.needed_bytes == tight.after.needed_bytes
    assert taken.peak_bytes < taken.needed_bytes
    text = tight.explain()
    assert f"  - enable_model_cpu_offload(): 5.66 GiB, +{taken.added_seconds:.1f} s, fits\n" in text
    assert "enable_vae_tiling(tile_size=512): " in text
    assert ", does not fit, LOSSY" in text
    assert len({item.name for item in tight.alternatives}) == len(tight.alternatives)
    assert Plan.from_json(tight.to_json()) == tight
    assert roomy.alternatives[0].fits
    assert "Ways to fit" not in roomy.explain()
