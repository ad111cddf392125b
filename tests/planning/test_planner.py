from __future__ import annotations

import dataclasses
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_turbo.errors import InvalidOptionError, NotSupportedError
from diffusers_turbo.facts.cards import CARDS
from diffusers_turbo.facts.device import DeviceFacts
from diffusers_turbo.planning.gains import COMPILE_GAINS
from diffusers_turbo.planning.options import ACTIONS, ModelOffload
from diffusers_turbo.planning.plan import Plan
from diffusers_turbo.planning.planner import make_plan, plan
from diffusers_turbo.planning.request import Request, settle
from diffusers_turbo.planning.speed import compile_trouble
from tests.planning.architectures import facts_of, sd15
from tests.planning.asking import actions_of, plan_on, reason_of

CARD_NAMES = [card.name for card in CARDS]
CASES = [("sd15", 512), ("sd15", 1024), ("sdxl", 1024), ("pixart", 1024)]


@pytest.mark.parametrize("card", CARD_NAMES)
@pytest.mark.parametrize(("name", "side"), CASES)
def test_every_card_gets_a_complete_plan_for_every_case(card, name, side):
    made = plan_on(card, name, height=side, width=side, images=10_000)
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
        assert not any(action.startswith("compile") for action in actions_of(made))


@pytest.mark.parametrize(("name", "side"), CASES)
def test_a_large_card_keeps_everything_resident_and_exact(name, side):
    made = plan_on("H100", name, height=side, width=side)
    assert made.exact
    assert not any("offload" in action for action in actions_of(made))


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
        assert not (device.sm or (0, 0)) < (7, 0) or not any("compile" in action for action in actions_of(made))
        assert "enable_tf32" not in actions_of(made)
    if exact.fits and not any(step.action == "enable_half_precision" for step in free.steps):
        assert free.exact, "an exact plan fits, so nothing lossy is needed"


def test_keep_reports_what_half_precision_would_gain():
    made = plan_on("RTX 3060", model_dtype="float32")
    assert "enable_half_precision" not in actions_of(made)
    assert "3.51 GiB to 1.76 GiB" in reason_of(made, "enable_half_precision")


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
    made = plan_on(card, name, model_dtype="float32", dtype="auto", vram_budget="64GB")
    found = [step.options["dtype"] for step in made.steps if step.action == "enable_half_precision"]
    assert found == ([taken] if taken else [])


def test_fp16_reasons_name_the_trouble():
    assert "NaN" in reason_of(plan_on("GTX 1650", model_dtype="float32", dtype="auto"), "enable_half_precision")
    assert "NaN" in reason_of(plan_on("CPU", model_dtype="float32", dtype="float16"), "enable_half_precision")
    assert "exact=True" in reason_of(
        plan_on("T4", model_dtype="float32", dtype="auto", exact=True), "enable_half_precision"
    )
    assert any("load the pipeline in another dtype" in note for note in plan_on("GTX 1650").notes)
    made = plan_on("T4", model_dtype="float16", dtype="float32")
    assert "restore nothing" in reason_of(made, "enable_half_precision")


def test_an_explicit_dtype_is_taken_where_the_card_has_it():
    made = plan_on("RTX 3060", model_dtype="float32", dtype="bfloat16")
    assert made.steps[0].options == {"dtype": "bfloat16"}
    assert "SM 8.0" in reason_of(plan_on("T4", model_dtype="float32", dtype="bfloat16"), "enable_half_precision")


def test_compiling_needs_enough_pictures_and_says_how_many():
    """Without graphs, that is."""
    even = COMPILE_GAINS["sd15"].break_even_images
    reason = reason_of(plan_on("H100", tier="none"), "compile_unet")
    assert f"from {even} pictures on" in reason
    assert "images=N" in reason
    assert "compile_unet" not in actions_of(plan_on("H100", images=even, tier="none"))
    many = plan_on("H100", images=even + 1, tier="none")
    assert actions_of(many)[-2:] == ["compile_unet", "compile_vae"]
    assert "enable_channels_last" in actions_of(plan_on("H100", "sdxl", images=10_000, tier="none"))
    assert "enable_channels_last" not in actions_of(plan_on("H100", "sdxl", tier="none"))


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
    assert "compile_unet" not in actions_of(made)
    assert text in reason_of(made, "compile_unet")


def test_offload_that_streams_excludes_compiling():
    made = plan_on("H100", "sdxl", images=10_000, vram_budget="2GB")
    assert "enable_partial_offload" in actions_of(made)
    assert "breaks the graph" in reason_of(made, "compile_unet")
    old = dataclasses.replace(DeviceFacts.card("H100"), versions={"accelerate": "1.12.0"})
    assert "before 1.13" in compile_trouble(settle(facts_of("sdxl"), old, Request()), "unet", [ModelOffload()])


def test_attention_already_in_force_is_not_switched_again():
    assert "Already in force on 32 layers" in reason_of(plan_on("H100"), "enable_sdpa")
    naive = dataclasses.replace(facts_of("sd15"), processors={"AttnProcessor": 32})
    made = plan(naive, DeviceFacts.card("H100"))
    assert "enable_sdpa" in actions_of(made)


def test_xformers_is_for_where_its_kernel_runs_and_sdpas_does_not():
    bare = dataclasses.replace(
        DeviceFacts.card("T4"), predicted_sdpa={"math": ("float16",)}, predicted_xformers={"cutlassF": ("float16",)}
    )
    assert "enable_xformers_memory_efficient_attention" in actions_of(plan(facts_of("sd15"), bare))
    both = dataclasses.replace(DeviceFacts.card("T4"), predicted_xformers={"cutlassF": ("float16",)})
    made = plan(facts_of("sd15"), both)
    assert "SDPA has a fused kernel" in reason_of(made, "enable_xformers_memory_efficient_attention")


def test_adapters_and_ip_adapters_keep_their_projections():
    adapted = dataclasses.replace(facts_of("sd15"), adapters=("style",))
    assert "style" in reason_of(plan(adapted, DeviceFacts.card("H100")), "fuse_qkv_projections")
    foreign = dataclasses.replace(facts_of("sd15"), processors={"IPAdapterAttnProcessor2_0": 16}, ip_adapter=True)
    made = plan(foreign, DeviceFacts.card("H100"))
    assert "IPAdapterAttnProcessor2_0" in reason_of(made, "enable_sdpa")
    assert "IP-Adapter" in reason_of(made, "fuse_qkv_projections")


def test_quantised_weights_are_left_as_they_are():
    facts = facts_of("sd15")
    parts = tuple(
        dataclasses.replace(part, quantised="bitsandbytes") if part.name == "unet" else part
        for part in facts.components
    )
    made = plan(dataclasses.replace(facts, components=parts), DeviceFacts.card("H100"), images=10_000, dtype="auto")
    touched = {"enable_half_precision", "enable_channels_last", "fuse_qkv_projections", "compile_unet"}
    assert not touched & set(actions_of(made))
    for action in (*touched, "enable_model_cpu_offload"):
        assert "unet is quantised (bitsandbytes)" in reason_of(made, action)


def test_a_torch_without_kernels_for_the_card_is_refused():
    device = dataclasses.replace(DeviceFacts.card("P100"), refusals={"torch": "this torch was built for sm_75"})
    with pytest.raises(NotSupportedError, match=r"plan\(\) for Tesla P100: found this torch was built for sm_75"):
        plan(facts_of("sd15"), device)


def test_a_pipeline_is_read_and_not_touched():
    pipe = sd15()
    processors = {name: id(value) for name, value in pipe.unet.attn_processors.items()}
    made = plan(pipe, DeviceFacts.card("T4"))
    assert made == plan_on("T4")
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
        ({"steps": None}, "steps = None; needed: a positive integer"),
        ({"batch_size": None}, "batch_size = None"),
        ({"images": -1}, "images = -1; needed: a positive integer"),
        ({"dtype": "int8"}, "dtype = 'int8'; needed: one of keep, auto"),
        ({"exact": "yes"}, "exact = 'yes'; needed: True or False"),
        ({"vram_budget": "lots"}, "vram_budget='lots'.*no positive size"),
    ],
)
def test_wrong_requests_are_refused(request_, text):
    with pytest.raises(InvalidOptionError, match=text):
        plan_on("T4", **request_)


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
    assert re.search(reason, reason_of(plan(facts_of(name), device), "enable_fused_kernels"))


def test_beside_a_compiler_fused_kernels_are_not_needed():
    made = plan(facts_of("sd15"), DeviceFacts.card("H100"), tier="compiled")
    assert "compile_unet" in actions_of(made)
    assert "The compiler fuses" in reason_of(made, "enable_fused_kernels")
