from __future__ import annotations

import dataclasses
import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_turbo.errors import InvalidOptionError, NotSupportedError
from diffusers_turbo.facts.cards import CARDS
from diffusers_turbo.facts.device import DeviceFacts
from diffusers_turbo.planning.gains import COMPILE_GAINS
from diffusers_turbo.planning.options import ACTIONS
from diffusers_turbo.planning.plan import Plan
from diffusers_turbo.planning.planner import make_plan, plan
from diffusers_turbo.planning.request import Request
from tests.planning.architectures import facts_of, sd15

CARD_NAMES = [card.name for card in CARDS]
CASES = [("sd15", 512), ("sd15", 1024), ("sdxl", 1024), ("pixart", 1024)]


def _actions(made: Plan) -> list[str]:
    return [step.action for step in made.steps]


def _reason(made: Plan, action: str) -> str:
    return next(item.reason for item in (*made.steps, *made.rejected) if item.action == action)


def _on(card: str, name: str = "sd15", model_dtype: str = "float16", **request) -> Plan:
    return plan(facts_of(name, model_dtype), DeviceFacts.card(card), **request)


@pytest.mark.parametrize("card", CARD_NAMES)
@pytest.mark.parametrize(("name", "side"), CASES)
def test_every_card_gets_a_complete_plan_for_every_case(card, name, side):
    made = _on(card, name, height=side, width=side, images=10_000)
    actions = [item.action for item in (*made.steps, *made.rejected)]
    assert sorted(actions) == sorted(ACTIONS)
    for item in (*made.steps, *made.rejected):
        assert item.reason.endswith(".")
        assert item.exact == ACTIONS[item.action].exact
    for step in made.steps:
        step.typed_options()
    assert made.fits
    sm = DeviceFacts.card(card).sm
    if sm is None or sm < (7, 0):
        assert not any(action.startswith("compile") for action in _actions(made))


@pytest.mark.parametrize(("name", "side"), CASES)
def test_a_large_card_keeps_everything_resident_and_exact(name, side):
    made = _on("H100", name, height=side, width=side)
    assert made.exact
    assert not any("offload" in action for action in _actions(made))


@settings(derandomize=True, deadline=None, max_examples=120)
@given(
    card=st.sampled_from(CARD_NAMES),
    case=st.sampled_from([("sd15", "float16"), ("sd15", "float32"), ("sdxl", "float16"), ("pixart", "bfloat16")]),
    side=st.sampled_from([256, 512, 768, 1024, 2048]),
    batch_size=st.integers(1, 8),
    images=st.sampled_from([None, 1, 1000]),
    budget=st.one_of(st.none(), st.integers(2**28, 2**35)),
    dtype=st.sampled_from(["keep", "auto", "float16", "bfloat16", "float32"]),
)
def test_properties_of_every_plan(card, case, side, batch_size, images, budget, dtype):
    facts, device = facts_of(*case), DeviceFacts.card(card)
    request = Request(
        height=side, width=side, batch_size=batch_size, images=images, vram_budget=budget, dtype=dtype, exact=True
    )
    exact = make_plan(facts, device, request)
    assert exact.exact
    free = make_plan(facts, device, dataclasses.replace(request, exact=False))
    for made in (exact, free):
        assert sorted(item.action for item in (*made.steps, *made.rejected)) == sorted(ACTIONS)
        assert Plan.from_json(made.to_json()) == made
        assert made.explain()
        assert len([step for step in made.steps if "offload" in step.action]) <= 1
        assert not (device.sm or (0, 0)) < (7, 0) or not any("compile" in action for action in _actions(made))
        assert "enable_tf32" not in _actions(made)
    if exact.fits and not any(step.action == "enable_half_precision" for step in free.steps):
        assert free.exact, "an exact plan fits, so nothing lossy is needed"


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


def test_offload_grows_with_need_and_tiles_come_last():
    ladder = [_on("H100", "sd15", vram_budget=budget, height=1024, width=1024) for budget in ("8GB", "3GB", "2.3GB")]
    assert not any("offload" in action for action in _actions(ladder[0]))
    assert "enable_model_cpu_offload" in _actions(ladder[1])
    assert "enable_group_offload" in _actions(ladder[2])
    assert "not enough" in _reason(ladder[2], "enable_model_cpu_offload")
    assert all(made.exact and made.fits for made in ladder)
    tight = _on("H100", "sd15", vram_budget="1.5GB", height=1024, width=1024)
    assert "enable_vae_tiling" in _actions(tight)
    assert "No exact plan fits" in _reason(tight, "enable_vae_tiling")
    assert "LOSSY" in tight.explain()
    assert tight.fits


def test_less_of_the_denoiser_stays_as_the_budget_shrinks_and_no_room_is_left_over():
    """Between model offload, which needs all of it at once, and group offload, which keeps none of it."""
    weights = facts_of("sdxl").denoiser_facts.parameter_bytes
    stays = []
    for tenths in range(16, 46, 2):
        made = _on("H100", "sdxl", vram_budget=tenths * 2**30 // 10)
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
    (tight,) = (step for step in _on("H100", "sdxl", vram_budget="3GB").steps if "offload" in step.action)
    assert tight.options["denoiser_leaves"] is True
    alone = dataclasses.replace(facts_of("sdxl"), vae=None)
    made = plan(alone, DeviceFacts.card("H100"), vram_budget="3GB")
    (roomy,) = (step for step in made.steps if "offload" in step.action)
    assert roomy.action == "enable_partial_offload"
    assert roomy.options["denoiser_leaves"] is False


def test_group_offload_streams_leaves_and_sequential_is_the_last_resort():
    made = _on("H100", "sdxl", vram_budget="1.3GB")
    (group,) = [step for step in made.steps if step.action == "enable_group_offload"]
    assert group.options["offload_type"] == "leaf_level"
    assert group.options["use_stream"] is True
    assert "enable_sequential_cpu_offload" not in _actions(made)


def test_when_nothing_fits_the_thriftiest_plan_says_so():
    made = _on("H100", "sdxl", vram_budget="300MB", exact=True)
    assert made.fits is False
    assert "DOES NOT FIT" in made.explain()
    assert any("nothing known fits" in note and "exact=False" in note for note in made.notes)


def test_vae_slicing_is_for_batches_that_need_it():
    assert "nothing to slice" in _reason(_on("H100"), "enable_vae_slicing")
    assert "Not needed" in _reason(_on("H100", batch_size=8), "enable_vae_slicing")
    tight = _on("H100", batch_size=8, vram_budget="5GB")
    assert "enable_vae_slicing" in _actions(tight)
    assert tight.exact


def test_keep_reports_what_half_precision_would_gain():
    made = _on("RTX 3060", model_dtype="float32")
    assert "enable_half_precision" not in _actions(made)
    assert "3.51 GiB to 1.76 GiB" in _reason(made, "enable_half_precision")


@pytest.mark.parametrize(
    ("card", "name", "taken"),
    [
        ("V100", "sd15", "float16"),
        ("T4", "sd15", "float16"),
        ("H100", "sdxl", "float16"),
        ("H100", "pixart", "bfloat16"),
        ("P100", "sd15", None),
        ("GTX 1650", "sd15", None),
        ("CPU", "sd15", None),
        ("MPS", "sd15", None),
        ("T4", "pixart", None),
    ],
)
def test_auto_takes_half_precision_only_where_it_is_safe(card, name, taken):
    made = _on(card, name, model_dtype="float32", dtype="auto", vram_budget="64GB")
    found = [step.options["dtype"] for step in made.steps if step.action == "enable_half_precision"]
    assert found == ([taken] if taken else [])


def test_fp16_reasons_name_the_trouble():
    assert "NaN" in _reason(_on("GTX 1650", model_dtype="float32", dtype="auto"), "enable_half_precision")
    assert "NaN" in _reason(_on("CPU", model_dtype="float32", dtype="float16"), "enable_half_precision")
    assert "exact=True" in _reason(_on("T4", model_dtype="float32", dtype="auto", exact=True), "enable_half_precision")
    assert any("load the pipeline in another dtype" in note for note in _on("GTX 1650").notes)
    made = _on("T4", model_dtype="float16", dtype="float32")
    assert "restore nothing" in _reason(made, "enable_half_precision")


def test_an_explicit_dtype_is_taken_where_the_card_has_it():
    made = _on("RTX 3060", model_dtype="float32", dtype="bfloat16")
    assert made.steps[0].options == {"dtype": "bfloat16"}
    assert "SM 8.0" in _reason(_on("T4", model_dtype="float32", dtype="bfloat16"), "enable_half_precision")


def test_compiling_needs_enough_pictures_and_says_how_many():
    """Without graphs, that is."""
    even = COMPILE_GAINS["sd15"].break_even_images
    reason = _reason(_on("H100", tier="none"), "compile_unet")
    assert f"from {even} pictures on" in reason
    assert "images=N" in reason
    assert "compile_unet" not in _actions(_on("H100", images=even, tier="none"))
    many = _on("H100", images=even + 1, tier="none")
    assert _actions(many)[-2:] == ["compile_unet", "compile_vae"]
    assert "enable_channels_last" in _actions(_on("H100", "sdxl", images=10_000, tier="none"))
    assert "enable_channels_last" not in _actions(_on("H100", "sdxl", tier="none"))


def test_the_memory_fallback_goes_along_where_little_room_is_left():
    roomy, tight, short = (_on("RTX 3060", vram_budget=budget) for budget in (None, "3GB", "200MB"))
    assert "enable_memory_fallback" not in _actions(roomy)
    assert "Room enough: " in _reason(roomy, "enable_memory_fallback")
    for made in (tight, short):
        assert _actions(made)[-1] == "enable_memory_fallback"
        assert "Little room is left (" in _reason(made, "enable_memory_fallback")
    assert (tight.fits, tight.exact, short.fits) == (True, True, False)
    assert "those of CUDA's allocator; this is" in _reason(_on("MPS"), "enable_memory_fallback")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"triton": False}, "Triton is missing"),
        ({"cxx_compiler": None}, "no C++ compiler"),
        ({"sm": (6, 1)}, "needs SM 7.0"),
    ],
)
def test_compiling_needs_its_tools(change, text):
    device = dataclasses.replace(DeviceFacts.card("H100"), **change)
    made = plan(facts_of("sd15"), device, images=10_000)
    assert "compile_unet" not in _actions(made)
    assert text in _reason(made, "compile_unet")


def test_offload_that_streams_excludes_compiling():
    made = _on("H100", "sdxl", images=10_000, vram_budget="2GB")
    assert "enable_partial_offload" in _actions(made)
    assert "breaks the graph" in _reason(made, "compile_unet")
    old = dataclasses.replace(DeviceFacts.card("H100"), versions={"accelerate": "1.12.0"})
    model_offload = plan(facts_of("sdxl"), old, images=10_000, vram_budget="6GB")
    assert "enable_model_cpu_offload" in _actions(model_offload)
    assert "before 1.13" in _reason(model_offload, "compile_unet")


def test_attention_already_in_force_is_not_switched_again():
    assert "Already in force on 32 layers" in _reason(_on("H100"), "enable_sdpa")
    naive = dataclasses.replace(facts_of("sd15"), processors={"AttnProcessor": 32})
    made = plan(naive, DeviceFacts.card("H100"))
    assert "enable_sdpa" in _actions(made)


def test_xformers_is_for_where_its_kernel_runs_and_sdpas_does_not():
    bare = dataclasses.replace(
        DeviceFacts.card("T4"), predicted_sdpa={"math": ("float16",)}, predicted_xformers={"cutlassF": ("float16",)}
    )
    assert "enable_xformers_memory_efficient_attention" in _actions(plan(facts_of("sd15"), bare))
    both = dataclasses.replace(DeviceFacts.card("T4"), predicted_xformers={"cutlassF": ("float16",)})
    made = plan(facts_of("sd15"), both)
    assert "SDPA has a fused kernel" in _reason(made, "enable_xformers_memory_efficient_attention")


def test_slices_replace_a_matrix_that_does_not_fit():
    made = _on("MPS", height=1024, width=1024)
    assert "enable_attention_slicing" in _actions(made)
    assert made.fits
    assert "holds no score matrix" in _reason(_on("H100"), "enable_attention_slicing")


def test_adapters_and_ip_adapters_keep_their_projections():
    adapted = dataclasses.replace(facts_of("sd15"), adapters=("style",))
    assert "style" in _reason(plan(adapted, DeviceFacts.card("H100")), "fuse_qkv_projections")
    foreign = dataclasses.replace(facts_of("sd15"), processors={"IPAdapterAttnProcessor2_0": 16}, ip_adapter=True)
    made = plan(foreign, DeviceFacts.card("H100"))
    assert "IPAdapterAttnProcessor2_0" in _reason(made, "enable_sdpa")
    assert "IP-Adapter" in _reason(made, "fuse_qkv_projections")


def test_quantised_weights_are_left_as_they_are():
    facts = facts_of("sd15")
    parts = tuple(
        dataclasses.replace(part, quantised="bitsandbytes") if part.name == "unet" else part
        for part in facts.components
    )
    made = plan(dataclasses.replace(facts, components=parts), DeviceFacts.card("H100"), images=10_000, dtype="auto")
    touched = {"enable_half_precision", "enable_channels_last", "fuse_qkv_projections", "compile_unet"}
    assert not touched & set(_actions(made))
    for action in (*touched, "enable_model_cpu_offload"):
        assert "unet is quantised (bitsandbytes)" in _reason(made, action)


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
    assert "exceed free host memory" in _reason(plan(facts_of("sdxl"), poor), "enable_model_cpu_offload")
    waiting = tuple(dataclasses.replace(part, devices=("cpu",)) for part in facts_of("sdxl").components)
    there = dataclasses.replace(facts_of("sdxl"), components=waiting)
    assert "exceed free host memory" not in _reason(plan(there, poor), "enable_model_cpu_offload")
    facts = facts_of("sd15")
    parts = tuple(dataclasses.replace(part, hooks=("accelerate:CpuOffload",)) for part in facts.components)
    made = plan(dataclasses.replace(facts, components=parts), DeviceFacts.card("H100"))
    assert "offloaded already (accelerate:CpuOffload)" in _reason(made, "enable_group_offload")


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
    assert "unknown" in _reason(made, "enable_model_cpu_offload")


def test_a_torch_without_kernels_for_the_card_is_refused():
    device = dataclasses.replace(DeviceFacts.card("P100"), refusals={"torch": "this torch was built for sm_75"})
    with pytest.raises(NotSupportedError, match=r"plan\(\) for Tesla P100: found this torch was built for sm_75"):
        plan(facts_of("sd15"), device)


def test_a_pipeline_is_read_and_not_touched():
    pipe = sd15()
    processors = {name: id(value) for name, value in pipe.unet.attn_processors.items()}
    made = plan(pipe, DeviceFacts.card("T4"))
    assert made == _on("T4")
    assert {name: id(value) for name, value in pipe.unet.attn_processors.items()} == processors
    with pytest.raises(NotSupportedError, match="an object of type dict"):
        plan({}, DeviceFacts.card("T4"))


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        ({"height": 500}, r"height = 500; needed: a multiple of 8 .*use height=496 or height=504"),
        ({"width": -8}, "width = -8; needed: a positive integer"),
        ({"width": 0}, "width = 0; needed: a positive integer"),
        ({"height": 512.0}, "height = 512.0; needed: a positive integer"),
        ({"batch_size": 0}, "batch_size = 0; needed: a positive integer"),
        ({"batch_size": None}, "batch_size = None"),
        ({"images": -1}, "images = -1; needed: a positive integer"),
        ({"dtype": "int8"}, "dtype = 'int8'; needed: one of keep, auto"),
        ({"exact": "yes"}, "exact = 'yes'; needed: True or False"),
        ({"vram_budget": "lots"}, "vram_budget='lots'.*no positive size"),
    ],
)
def test_wrong_requests_are_refused(request_, text):
    with pytest.raises(InvalidOptionError, match=text):
        _on("T4", **request_)


@pytest.mark.parametrize(
    ("device", "name", "reason"),
    [
        (DeviceFacts.card("P100"), "sd15", r"Triton needs SM 7.0, this is Tesla P100 .*SM 6.0"),
        (dataclasses.replace(DeviceFacts.card("H100"), triton=False), "sd15", "Triton is missing"),
        (dataclasses.replace(DeviceFacts.card("H100"), sm=None), "sd15", "written for NVIDIA GPUs"),
        (dataclasses.replace(DeviceFacts.card("H100"), device_type="cpu", sm=None), "sd15", "NVIDIA GPUs only"),
        (DeviceFacts.card("H100"), "pixart", "A transformer has few of the layers they fit"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_fused_kernels_are_left_with_the_precise_reason(device, name, reason):
    assert re.search(reason, _reason(plan(facts_of(name), device), "enable_fused_kernels"))


def test_beside_a_compiler_fused_kernels_are_not_needed():
    made = plan(facts_of("sd15"), DeviceFacts.card("H100"), images=10_000)
    assert "compile_unet" in _actions(made)
    assert "The compiler fuses" in _reason(made, "enable_fused_kernels")
