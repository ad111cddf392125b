"""Tiers: by themselves where they were measured, whole where they fit, and the choice between them from figures."""

from __future__ import annotations

import dataclasses
import json
import re
import statistics
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LCMScheduler

from diffusers_turbo import DeviceFacts, Plan, auto_optimize, plan
from diffusers_turbo.errors import InvalidOptionError
from diffusers_turbo.facts.pipeline import read_pipeline
from diffusers_turbo.graphs.capture import CAPTURES
from diffusers_turbo.parity import distance
from diffusers_turbo.planning.gains import FLOAT32_TIER_GAINS, FUSED_GAINS, TIER_GAINS
from diffusers_turbo.planning.memory import FIXED_BYTES, estimate_memory
from diffusers_turbo.planning.options import ChannelsLast, CUDAGraphs
from diffusers_turbo.planning.planner import make_plan
from diffusers_turbo.planning.request import Request
from tests import tiny
from tests.fused.on_cpu import plain_kernels
from tests.graphs.fake import FakeCapture
from tests.planning.architectures import facts_of
from tests.state import differences, state_of

H100 = DeviceFacts.card("H100")
ROOT = Path(__file__).parents[2]
ONLY_OF_TIERS = {
    *("enable_cuda_graphs", "enable_sync_free_loop", "enable_fused_kernels", "enable_shared_guidance"),
    *("enable_prompt_projections", "enable_time_projections", "enable_vae_upcast_copy", "enable_pointwise_matmul"),
}


def taken(made: Plan) -> set[str]:
    return {step.action for step in made.steps}


def reason(made: Plan, action: str) -> str:
    return next(item.reason for item in (*made.steps, *made.rejected) if item.action == action)


@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl"])
def test_what_was_measured_is_the_default(name):
    made = plan(facts_of(name), H100)
    assert taken(made) >= {"enable_cuda_graphs", "enable_sync_free_loop", "enable_fused_kernels"}
    assert "compile_unet" not in taken(made)
    gain = TIER_GAINS[name]
    assert f"instant tier: {gain.plain_ms} to {gain.instant_ms} ms a picture" in " ".join(made.notes)
    assert taken(plan(facts_of(name), H100, tier="none")) & ONLY_OF_TIERS == set()


@pytest.mark.parametrize(
    ("facts", "why"),
    [
        (facts_of("pixart"), "it has not been measured for this model"),
        (facts_of("sdxl", dtype="float32"), "it has not been measured for sdxl in float32"),
    ],
    ids=["pixart", "float32"],
)
def test_what_was_not_measured_has_to_be_asked_for(facts, why):
    made = plan(facts, H100, images=10_000)
    assert taken(made) & ONLY_OF_TIERS == set()
    assert why in reason(made, "enable_cuda_graphs")
    assert "enable_cuda_graphs" in taken(plan(facts, H100, tier="instant"))


@pytest.mark.parametrize("name", ["sd15", "sd21"])
def test_in_float32_what_was_measured_is_the_default(name):
    made, gain = plan(facts_of(name, dtype="float32"), H100), FLOAT32_TIER_GAINS[name]
    switches = {
        case: {switch["action"] for switch in found["switches"]}
        for case, found in tomllib.loads((ROOT / "docs" / "benchmarks" / "float32.toml").read_text()).items()
    }
    assert taken(made) & (ONLY_OF_TIERS | {"enable_channels_last", "fuse_qkv_projections"}) == switches["kernels"]
    assert f"instant tier: {gain.plain_ms} to {gain.instant_ms} ms a picture" in " ".join(made.notes)
    rows = rows_of(gain.source)
    assert (gain.plain_ms, gain.instant_ms) == (milliseconds(rows["stock"]), milliseconds(rows["kernels"]))
    no_tf32 = dataclasses.replace(H100, refusals={**H100.refusals, "tf32": "said so"})
    without = plan(facts_of(name, dtype="float32"), no_tf32)
    assert "beside fused kernels" in reason(without, "enable_channels_last")
    assert "with TF32 only" in reason(without, "enable_fused_kernels")


def test_instant_on_sd15():
    made = plan(facts_of("sd15"), H100, tier="instant", images=10_000)
    assert taken(made) >= ONLY_OF_TIERS - {"enable_vae_upcast_copy"} | {
        "enable_channels_last",
        "fuse_qkv_projections",
    }
    assert not any(action.startswith("compile") for action in taken(made))
    assert all(step.exact for step in made.steps)
    assert "does without a compiler" in reason(made, "compile_unet")
    assert "decodes in the dtype its VAE has" in reason(made, "enable_vae_upcast_copy")


@pytest.mark.parametrize(
    ("facts", "why"),
    [
        (facts_of("sd15", dtype="float32"), "In float32 convolutions may be set to use TF32"),
        (facts_of("pixart"), "It was made for UNets"),
    ],
    ids=["float32", "pixart"],
)
def test_where_1x1_convolutions_stay_convolutions(facts, why):
    made = plan(facts, H100, tier="instant", exact=True)
    assert why in reason(made, "enable_pointwise_matmul")


def test_compiled_on_sdxl():
    made = plan(facts_of("sdxl"), H100, tier="compiled")
    assert taken(made) >= {"compile_unet", "compile_vae", "enable_cuda_graphs", "enable_vae_upcast_copy"}
    assert "enable_fused_kernels" not in taken(made)
    assert "The compiler fuses the same passes itself" in reason(made, "enable_fused_kernels")
    assert "adds biases in other passes" in reason(made, "enable_pointwise_matmul")
    assert "two equal halves is not known" in reason(made, "enable_shared_guidance")
    order = [step.action for step in made.steps]
    assert order.index("compile_unet") < order.index("enable_cuda_graphs") < order.index("enable_prompt_projections")


@pytest.mark.parametrize(("given", "kept"), [(None, None), (True, True), (Path("a folder"), "a folder")])
def test_where_compiled_code_is_kept(given, kept):
    made = plan(facts_of("sd15"), H100, tier="compiled", cache_dir=given)
    folders = {step.action: step.options["cache_dir"] for step in made.steps if "cache_dir" in step.options}
    assert folders == {"compile_unet": kept, "compile_vae": kept}
    assert Plan.from_json(made.to_json()) == made


def test_a_folder_that_is_none_is_refused():
    with pytest.raises(InvalidOptionError, match="cache_dir=3.*True, False, None or a folder"):
        plan(facts_of("sd15"), H100, cache_dir=3)


@pytest.mark.parametrize("make", [tiny.sd, tiny.pixart])
def test_auto_optimize_keeps_what_its_plan_compiles(make, monkeypatch, tmp_path):
    monkeypatch.setitem(CAPTURES, "cpu", FakeCapture)
    plain_kernels(monkeypatch)
    monkeypatch.setattr("diffusers_turbo.entry.make_plan", lambda pipe, facts, **given: plan(pipe, H100, **given))
    pipe = auto_optimize(make(), tier="compiled", cache_dir=tmp_path)
    compiled = [lever for lever in pipe.turbo_report().levers if lever.action.startswith("compile")]
    assert [lever.options["cache_dir"] for lever in compiled] == [str(tmp_path)] * 2


@pytest.fixture
def compiling_pays(monkeypatch):
    """Figures by which a compiled picture is sooner done than one of the instant tier."""
    gain = dataclasses.replace(TIER_GAINS["sd15"], compiled_ms=TIER_GAINS["sd15"].instant_ms - 12)
    monkeypatch.setitem(TIER_GAINS, "sd15", gain)
    return gain


@pytest.mark.parametrize("tier", ["fastest", None])
def test_fastest_compiles_from_the_break_even_on_and_states_it(tier, compiling_pays):
    pays = compiling_pays.break_even_images
    few, many = (plan(facts_of("sd15"), H100, tier=tier, images=images) for images in (pays - 1, pays))
    assert "compile_unet" not in taken(few)
    assert "compile_unet" in taken(many)
    for made in (few, many, plan(facts_of("sd15"), H100, tier=tier)):
        assert f"compiling pays from {pays} pictures on" in " ".join(made.notes)
        assert "enable_cuda_graphs" in taken(made)


def test_fastest_does_not_compile_what_was_measured_to_be_slower():
    made = plan(facts_of("sd15"), H100, tier="fastest", images=10**6)
    gain = TIER_GAINS["sd15"]
    assert gain.compiled_ms > gain.instant_ms
    assert "compile_unet" not in taken(made)
    assert f"compiling pays for no number of pictures ({gain.compiled_ms} ms; " in " ".join(made.notes)


def test_without_first_images_nobody_knows_when_compiling_pays(compiling_pays, monkeypatch):
    monkeypatch.setitem(TIER_GAINS, "sd15", dataclasses.replace(compiling_pays, compiled_first_s=None))
    made = plan(facts_of("sd15"), H100, tier="fastest", images=10**6)
    assert "compile_unet" not in taken(made)
    assert "nothing was measured to say when compiling pays" in " ".join(made.notes)


def test_fastest_does_not_compile_where_nothing_says_that_it_pays():
    made = plan(facts_of("sdxl"), H100, tier="fastest", images=10**6)
    assert TIER_GAINS["sdxl"].break_even_images is None
    assert "compile_unet" not in taken(made)
    assert "nothing was measured to say when compiling pays" in " ".join(made.notes)


def test_the_break_even_is_where_both_are_done_at_the_same_time(compiling_pays):
    gain = compiling_pays
    for images, compiled_is_sooner in ((gain.break_even_images, True), (gain.break_even_images - 1, False)):
        instant = gain.instant_first_s + images * gain.instant_ms / 1000
        compiled = gain.compiled_first_s + images * gain.compiled_ms / 1000
        assert (compiled < instant) == compiled_is_sooner
    assert dataclasses.replace(gain, compiled_ms=gain.instant_ms).break_even_images is None


def rows_of(source: str) -> dict[str, dict[str, Any]]:
    return {row["case"]: row for row in json.loads((ROOT / source).read_text())["rows"] if row["batch"] == 1}


def milliseconds(row: dict[str, Any]) -> int:
    assert len(row["seconds"]) >= 7
    return round(1000 * statistics.median(row["seconds"]))


def test_figures_of_fused_projections_are_those_of_their_file():
    gain = FUSED_GAINS["sdxl"]
    rows = rows_of(gain.source)
    # the tier that was measured did without
    assert (gain.separate_ms, gain.fused_ms) == (milliseconds(rows["tier-instant"]), milliseconds(rows["kernels"]))


@pytest.mark.parametrize("family", TIER_GAINS)
def test_figures_are_those_of_their_files(family):
    gain = TIER_GAINS[family]
    rows = rows_of(gain.source)
    assert (gain.plain_ms, gain.instant_ms) == (milliseconds(rows["stock"]), milliseconds(rows["tier-instant"]))
    if gain.compiled_source is not None:
        rows = rows_of(gain.compiled_source)
        assert gain.compiled_ms == milliseconds(rows["tier-compiled"])
        for name, seconds in (("instant", gain.instant_first_s), ("compiled", gain.compiled_first_s)):
            assert seconds == float(f"{rows[f'tier-{name}']['first_image_s']:.3g}")


@pytest.mark.parametrize(
    ("device", "why"),
    [
        (DeviceFacts.card("P100"), "Triton needs SM 7.0"),
        (dataclasses.replace(H100, cxx_compiler=False), "There is no C++ compiler"),
    ],
)
def test_compiled_where_nothing_compiles_is_instant(device, why):
    made = plan(facts_of("sd15"), device, tier="compiled")
    assert "enable_cuda_graphs" in taken(made)
    assert "compile_unet" not in taken(made)
    assert why in reason(made, "compile_unet")
    assert re.search(f"instant tier: not compiled: .*{re.escape(why)}", " ".join(made.notes), re.IGNORECASE)


def test_no_tier_where_weights_move_or_there_is_no_nvidia_gpu():
    small = plan(facts_of("sdxl"), H100, tier="instant", vram_budget="100MB")
    assert "enable_sequential_cpu_offload" in taken(small)
    assert taken(small) & ONLY_OF_TIERS == set()
    assert "not beside enable_" in reason(small, "enable_cuda_graphs")
    cpu = dataclasses.replace(H100, device_type="cpu", sm=None, name="a CPU")
    for tier in ("fastest", None):
        made = plan(facts_of("sd15"), cpu, tier=tier)
        assert taken(made) & ONLY_OF_TIERS == set()
        assert "tiers are for NVIDIA GPUs, this is a CPU" in reason(made, "enable_prompt_projections")


@pytest.mark.parametrize("tier", [None, "instant"])
def test_weights_move_before_graphs_go(tier):
    """Between the room for everything and that for the weights alone: moving some costs less than having no graphs."""
    facts, graphs = facts_of("sdxl"), plan(facts_of("sdxl"), H100, tier=tier).after.needed_bytes
    lean = int(estimate_memory(facts, 1024, 1024, 1, [ChannelsLast()]).needed_bytes)
    assert lean < graphs
    made = plan(facts, H100, tier=tier, vram_budget=(lean + graphs) // 2)
    assert made.fits
    (offload,) = (step for step in made.steps if "offload" in step.action)
    assert offload.options["resident_bytes"] is None
    assert {"enable_cuda_graphs", "enable_prompt_projections"} <= taken(made) & ONLY_OF_TIERS
    assert "would fit without it, but not with CUDA graphs, which spare up to 1.7 s a call" in offload.reason
    resident, without = made.alternatives[0], made.alternatives[1]
    assert (resident.fits, without.fits) == (False, True)
    assert without.added_seconds == pytest.approx((2581 - 894) / 1000)  # of the same number of steps


def test_without_a_tier_weights_stay_where_they_fit():
    facts = facts_of("sdxl")
    plain, lean = (estimate_memory(facts, 1024, 1024, 1, options).needed_bytes for options in ([], [ChannelsLast()]))
    made = plan(facts, H100, tier="none", vram_budget=int(lean + plain) // 2)
    assert made.fits
    assert not any("offload" in action for action in taken(made))
    assert "Memory is tight, and convolutions need less" in reason(made, "enable_channels_last")
    assert len({item.name for item in made.alternatives}) == len(made.alternatives)


def test_an_estimate_counts_what_graphs_keep():
    facts = facts_of("sd15")
    plain, graphs = (estimate_memory(facts, 512, 512, 1, options) for options in ((), (CUDAGraphs(),)))
    for before, after in zip(plain.stages, graphs.stages, strict=True):
        others = [stage for stage in plain.stages if stage is not before]
        kept = sum(stage.activation_bytes + stage.workspace_bytes - FIXED_BYTES for stage in others)
        assert after.peak_bytes - before.peak_bytes == kept > 0


def lcm() -> Any:
    pipe = tiny.sd()
    pipe.unet = tiny.unet(time_cond_proj_dim=8)
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    return pipe


def text_projection() -> Any:
    pipe = tiny.sd()
    pipe.unet = tiny.unet(encoder_hid_dim=tiny.CONTEXT, encoder_hid_dim_type="text_proj")
    return pipe


def classes() -> Any:
    pipe = tiny.sd()
    pipe.unet = tiny.unet(class_embed_type="timestep")
    return pipe


@pytest.mark.parametrize("make", [tiny.sd, tiny.sdxl, tiny.pixart, lcm, text_projection, classes])
@pytest.mark.parametrize("tier", ["instant", "compiled"])
def test_what_is_planned_can_be_applied(make, tier, monkeypatch):
    """On every kind of denoiser: a plan takes nothing that its action then refuses. The CPU stands for the GPU."""
    monkeypatch.setitem(CAPTURES, "cpu", FakeCapture)
    plain_kernels(monkeypatch)
    pipe = make()
    made = plan(pipe, H100, tier=tier)
    monkeypatch.setattr("diffusers_turbo.entry.make_plan", lambda *args, **kwargs: made)
    before = state_of(pipe)
    auto_optimize(pipe)
    assert {lever.action for lever in pipe.turbo_report().levers} >= taken(made)
    pipe.turbo_undo()
    assert differences(before, state_of(pipe)) == []


@pytest.mark.parametrize("make", [tiny.sd, tiny.sdxl])
def test_the_instant_tier_draws_stocks_picture(make, monkeypatch):
    monkeypatch.setitem(CAPTURES, "cpu", FakeCapture)
    plain_kernels(monkeypatch)
    pipe = make()
    stock = tiny.picture(pipe, steps=4)
    facts = read_pipeline(make().to(torch.float16))
    made = make_plan(facts, H100, Request(tier="instant"))
    made = dataclasses.replace(made, steps=tuple(s for s in made.steps if s.action != "enable_vae_upcast_copy"))
    monkeypatch.setattr("diffusers_turbo.entry.make_plan", lambda *args, **kwargs: made)
    auto_optimize(pipe)
    for _ in range(2):
        assert distance(tiny.picture(pipe, steps=4), stock).psnr_db >= 90


def test_a_wrong_tier_is_refused():
    with pytest.raises(
        InvalidOptionError, match="tier = 'turbo'; needed: one of instant, compiled, fastest, none, or None"
    ):
        plan(facts_of("sd15"), H100, tier="turbo")
