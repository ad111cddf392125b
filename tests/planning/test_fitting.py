"""Plans where memory is tight: which switches fit the room there is, in which order, and what room there is."""

from __future__ import annotations

import dataclasses
import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_turbo.facts.device import DeviceFacts
from diffusers_turbo.planning.planner import make_plan, plan
from diffusers_turbo.planning.request import Request
from tests.planning.architectures import facts_of, without_exact_tiles
from tests.planning.asking import actions_of, plan_on, reason_of


@settings(derandomize=True, deadline=None, max_examples=80)
@given(
    case=st.sampled_from([("sd15", "float16"), ("sd15", "float32"), ("sdxl", "float16")]),
    card=st.sampled_from(["T4", "RTX 3060", "H100", "P100", "MPS"]),
    side=st.sampled_from([512, 1024]),
    batch_size=st.integers(1, 4),
    images=st.sampled_from([None, 5000]),
    exact=st.booleans(),
    budgets=st.tuples(st.integers(2**28, 2**34), st.integers(2**28, 2**34)),
)
def test_a_smaller_budget_never_gives_a_less_thrifty_plan(case, card, side, batch_size, images, exact, budgets):
    facts, device = facts_of(*case), DeviceFacts.card(card)
    smaller, larger = (
        make_plan(
            facts,
            device,
            Request(height=side, width=side, batch_size=batch_size, images=images, vram_budget=budget, exact=exact),
        )
        for budget in sorted(budgets)
    )
    assert smaller.after is not None
    assert larger.after is not None
    assert smaller.after.needed_bytes <= larger.after.needed_bytes


def test_without_prefetching_only_where_nothing_else_that_streams_fits():
    made = {budget: plan_on("H100", "sd15", vram_budget=budget) for budget in ("300MB", "360MB")}
    step = {
        budget: next(step for step in plan.steps if step.action == "enable_partial_offload")
        for budget, plan in made.items()
    }
    assert [step[budget].options["prefetch"] for budget in made] == [False, True]
    assert "one group of layers after the other" in step["300MB"].reason
    assert "less what computing hides" in step["360MB"].reason
    assert all(plan.fits for plan in made.values())


def test_offload_grows_with_need_and_tiles_come_last():
    ladder = [
        plan_on("H100", "sd15", vram_budget=budget, height=1024, width=1024) for budget in ("8GB", "3GB", "2.3GB")
    ]
    assert not any("offload" in action for action in actions_of(ladder[0]))
    (whole,), (less,) = ([step for step in made.steps if "offload" in step.action] for made in ladder[1:])
    assert whole.action == "enable_partial_offload"
    assert whole.options["resident_bytes"] is None
    assert "The denoiser is there whole while it works and leaves while other components work" in whole.reason
    assert "Not needed: enable_partial_offload fits" in reason_of(ladder[1], "enable_model_cpu_offload")
    assert less.options["resident_bytes"] < facts_of("sd15").denoiser_facts.parameter_bytes
    assert less.options["by_layers"] == ["vae"]
    assert "; vae come layer by layer" in less.reason
    assert "not enough" in reason_of(ladder[2], "enable_model_cpu_offload")
    assert all(made.exact and made.fits for made in ladder)
    facts = without_exact_tiles(facts_of("sd15"))
    tight = plan(facts, DeviceFacts.card("H100"), vram_budget="1.5GB", height=1024, width=1024)
    assert "enable_vae_tiling" in actions_of(tight)
    assert "No exact plan fits" in reason_of(tight, "enable_vae_tiling")
    assert "LOSSY" in tight.explain()
    assert tight.fits


def test_exact_tiles_come_before_lossy_ones_and_go_as_far_as_needed():
    taken = {}
    for budget in ("8GB", "2GB", "800MB", "560MB"):
        made = plan_on("H100", "sdxl", vram_budget=budget)
        assert made.exact
        assert made.fits
        step = next((step for step in made.steps if step.action == "enable_vae_exact_tiling"), None)
        taken[budget] = None if step is None else (step.options["hold_on"], step.options["tile_size"])
        assert "enable_vae_tiling" not in actions_of(made)
        if step is not None:
            assert re.search(r"That adds [\d.]+ m?s on an H100", step.reason)
            assert ("wait in host memory" in step.reason) == (step.options["hold_on"] == "host")
    assert list(taken.values()) == [None, ("device", 256), ("host", 256), ("host", 128)]
    assert "Not needed" in reason_of(plan_on("H100", "sdxl"), "enable_vae_exact_tiling")
    assert "fits into one tile" in reason_of(plan_on("H100", height=128, width=128), "enable_vae_exact_tiling")
    lossy = plan(without_exact_tiles(facts_of("sdxl")), DeviceFacts.card("H100"), vram_budget="2GB")
    assert "is not known to it" in reason_of(lossy, "enable_vae_exact_tiling")
    assert "enable_vae_tiling" in actions_of(lossy)


@pytest.mark.parametrize(
    ("card", "room", "on_host"),
    [("H100", 2**36, True), ("H100", 2**31 + 2**10, True), ("H100", 2**31 - 2**10, False), ("MPS", 2**36, False)],
)
def test_pictures_wait_on_the_host_where_it_has_twice_the_room_and_memory_of_its_own(card, room, on_host):
    device = dataclasses.replace(DeviceFacts.card(card), host_ram_bytes=room)
    facts = facts_of("sdxl")  # two pictures of 512 MiB
    made = plan(facts, device, vram_budget="700MB")
    assert any("hold_on='host'" in call for item in made.alternatives for call in item.switches) == on_host


def test_what_moves_norms_one_by_one_goes_beside_no_exact_tiles():
    for item in plan_on("H100", "sdxl", vram_budget="400MB").alternatives:
        calls = " ".join(item.switches)
        assert "exact_tiling" not in calls or not ("group" in calls or "sequential" in calls)


def test_less_of_the_denoiser_stays_as_the_budget_shrinks_and_no_room_is_left_over():
    """Between the room for all of it at once, and group offload, which keeps none of it."""
    weights = facts_of("sdxl").denoiser_facts.parameter_bytes
    stays = []
    for tenths in range(16, 46, 2):
        made = plan_on("H100", "sdxl", vram_budget=tenths * 2**30 // 10)
        (step,) = (step for step in made.steps if step.action == "enable_partial_offload")
        stays.append(step.options["resident_bytes"])
        # a share more would not have fitted
        assert made.after.needed_bytes <= made.budget_bytes < made.after.needed_bytes + weights / 32
        assert "copied at every step" in step.reason
    assert stays == sorted(stays)
    assert max(after - before for before, after in itertools.pairwise(stays)) <= 2**30 // 5 + weights / 32
    assert stays[-1] > 0.65 * weights


def test_the_denoiser_leaves_only_when_that_makes_room():
    """SDXL decodes in more room than it denoises in; latents that nobody decodes leave room for what stays."""
    (tight,) = (step for step in plan_on("H100", "sdxl", vram_budget="3GB").steps if "offload" in step.action)
    assert tight.options["denoiser_leaves"] is True
    alone = dataclasses.replace(facts_of("sdxl"), vae=None)
    made = plan(alone, DeviceFacts.card("H100"), vram_budget="3GB")
    (roomy,) = (step for step in made.steps if "offload" in step.action)
    assert roomy.action == "enable_partial_offload"
    assert roomy.options["denoiser_leaves"] is False


def test_a_denoiser_that_is_there_whole_is_recorded():
    made = plan_on("RTX 3060", "sdxl", vram_budget="6GB")
    whole = {step.action for step in made.steps}
    assert {"enable_cuda_graphs", "enable_fused_kernels", "enable_time_projections"} <= whole
    assert "enable_fused_qkv" not in whole
    assert "offload moves the weights that a copy is kept of" in reason_of(made, "enable_vae_upcast_copy")
    streamed = plan_on("RTX 3060", "sdxl", vram_budget="3GB")
    assert "enable_cuda_graphs" in actions_of(streamed)  # with the copies of what is streamed
    assert "hooks take the forwards that this replaces" in reason_of(streamed, "enable_prompt_projections")


def test_group_offload_streams_leaves_and_sequential_is_the_last_resort():
    made = plan_on("MPS", "sdxl", vram_budget="700MB")
    assert not any("offload" in action for action in actions_of(made))
    facts = without_exact_tiles(facts_of("sdxl"))
    made = plan(facts, DeviceFacts.card("H100"), vram_budget="560MB")
    fits = {item.switches[-1]: item for item in made.alternatives if item.fits}
    group = next(item for name, item in fits.items() if name.startswith("enable_group_offload"))
    assert "offload_type='leaf_level', non_blocking=True, use_stream=True" in group.switches[-1]
    assert fits["enable_sequential_cpu_offload()"].added_seconds > 3 * group.added_seconds


def test_when_nothing_fits_the_thriftiest_plan_says_so():
    made = plan_on("H100", "sdxl", vram_budget="300MB", exact=True)
    assert made.fits is False
    assert "DOES NOT FIT" in made.explain()
    assert any("nothing known fits" in note and "exact=False" in note for note in made.notes)


def test_vae_slicing_is_for_batches_that_need_it():
    assert "nothing to slice" in reason_of(plan_on("H100"), "enable_vae_slicing")
    assert "Not needed" in reason_of(plan_on("H100", batch_size=8), "enable_vae_slicing")
    tight = plan_on("H100", batch_size=8, vram_budget="5GB")
    assert "enable_vae_slicing" in actions_of(tight)
    assert tight.exact


def test_the_memory_fallback_goes_along_where_little_room_is_left():
    roomy, tight, short = (plan_on("RTX 3060", vram_budget=budget) for budget in (None, "3GB", "100MB"))
    assert "enable_memory_fallback" not in actions_of(roomy)
    assert "Room enough: " in reason_of(roomy, "enable_memory_fallback")
    for made in (tight, short):
        assert actions_of(made)[-1] == "enable_memory_fallback"
        assert "Little room is left (" in reason_of(made, "enable_memory_fallback")
    assert (tight.fits, tight.exact, short.fits) == (True, True, False)
    assert "those of CUDA's allocator; this is" in reason_of(plan_on("MPS"), "enable_memory_fallback")


def test_where_a_plan_is_of_tiles_the_fallback_may_make_them_smaller():
    tiled = plan(without_exact_tiles(facts_of("sdxl")), DeviceFacts.card("H100"), vram_budget="1.5GB")
    assert "enable_vae_tiling" in actions_of(tiled)
    assert next(step for step in tiled.steps if step.action == "enable_memory_fallback").options["allow_tiling"]
    assert "at last in smaller tiles" in reason_of(tiled, "enable_memory_fallback")
    exact = plan_on("H100", "sdxl", vram_budget="5GB")
    assert exact.exact
    assert not next(step for step in exact.steps if step.action == "enable_memory_fallback").options["allow_tiling"]


def test_slices_replace_a_matrix_that_does_not_fit():
    made = plan_on("MPS", height=1024, width=1024)
    assert "enable_attention_slicing" in actions_of(made)
    assert made.fits
    assert "holds no score matrix" in reason_of(plan_on("H100"), "enable_attention_slicing")


@pytest.mark.parametrize("budget", ["6GB", "4.5GB", "1.5GB"])
def test_offload_works_on_the_device_that_was_asked_for(budget):
    """Left alone it would take the first."""
    second = dataclasses.replace(DeviceFacts.card("H100"), device="cuda:1")
    first = dataclasses.replace(DeviceFacts.card("H100"), device="cuda:0")
    devices = []
    for card in (first, second):
        made = plan(facts_of("sdxl"), card, height=512, width=512, vram_budget=budget)
        step = next(step for step in made.steps if "offload" in step.action)
        devices.append(step.options.get("onload_device", step.options.get("device")))
    assert devices == [None, "cuda:1"]


def test_weights_on_another_card_are_no_room_on_this_one():
    there = tuple(dataclasses.replace(part, devices=("cuda:0",)) for part in facts_of("sdxl").components)
    facts = dataclasses.replace(facts_of("sdxl"), components=there)
    rooms = [
        plan(facts, dataclasses.replace(DeviceFacts.card("T4"), device=name, free_bytes=2**30)).budget_bytes
        for name in ("cuda:0", "cuda", "cuda:1")
    ]
    assert rooms == [2**30 + facts.parameter_bytes, 2**30 + facts.parameter_bytes, 2**30]


def test_offload_needs_host_memory_and_no_other_offload():
    poor = dataclasses.replace(DeviceFacts.card("H100"), host_ram_bytes=2**30)
    assert "exceed free host memory" in reason_of(plan(facts_of("sdxl"), poor), "enable_model_cpu_offload")
    waiting = tuple(dataclasses.replace(part, devices=("cpu",)) for part in facts_of("sdxl").components)
    there = dataclasses.replace(facts_of("sdxl"), components=waiting)
    assert "exceed free host memory" not in reason_of(plan(there, poor), "enable_model_cpu_offload")
    facts = facts_of("sd15")
    parts = tuple(dataclasses.replace(part, hooks=("accelerate:CpuOffload",)) for part in facts.components)
    made = plan(dataclasses.replace(facts, components=parts), DeviceFacts.card("H100"))
    assert "offloaded already (accelerate:CpuOffload)" in reason_of(made, "enable_group_offload")


def test_the_pipelines_own_weights_count_as_usable():
    facts, device = facts_of("sd15"), DeviceFacts.card("H100")
    device = dataclasses.replace(device, free_bytes=2**30)
    parts = tuple(dataclasses.replace(part, devices=("cuda:0",)) for part in facts.components)
    made = plan(dataclasses.replace(facts, components=parts), device)
    assert made.budget_bytes == 2**30 + facts.parameter_bytes


def test_unknown_memory_takes_no_memory_switch():
    device = dataclasses.replace(DeviceFacts.card("H100"), free_bytes=0)
    made = plan(facts_of("sdxl"), device)
    assert made.fits is None
    assert "unknown" in reason_of(made, "enable_model_cpu_offload")
