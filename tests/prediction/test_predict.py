"""What is predicted of a whole call: its stages, each switch in the right direction and amount, and what is said."""

from __future__ import annotations

import json

import diffusers
import pytest
import torch
from torch import nn

from diffusers_turbo import predict_memory, turbo
from diffusers_turbo.errors import InvalidOptionError, NotSupportedError
from diffusers_turbo.facts.device import DeviceFacts
from diffusers_turbo.facts.pipeline import read_pipeline
from diffusers_turbo.planning import options as opt
from diffusers_turbo.planning.ladder import EXACT_TILES
from diffusers_turbo.planning.memory import estimate_memory
from diffusers_turbo.planning.options import ACTIONS
from diffusers_turbo.planning.planner import plan
from diffusers_turbo.planning.units import MIB
from diffusers_turbo.prediction import stages
from diffusers_turbo.prediction.predict import Predictor
from diffusers_turbo.prediction.switches import (
    AS_PLAIN,
    ATTENTION,
    IN_REPLAY,
    NO_DIFFERENCE,
    ON_DENOISER,
    ON_SKELETON,
    ON_VAE,
)
from diffusers_turbo.prediction.workspaces import workspaces_of
from tests import tiny
from tests.bench.shrunk import build as shrunk
from tests.planning.architectures import measured

H100 = DeviceFacts.card("H100")


@pytest.fixture(scope="module")
def sd15():
    """One predictor for full-size SD1.5: its networks are run once for all tests that ask."""
    return Predictor(measured("sd15", torch.float16))


@pytest.fixture(scope="module")
def thin():
    """One predictor for a few thin layers of four heads: what it holds in scores and pictures is full-size."""
    return Predictor(tiny.sd())


def _peaks(predictor, *options, **size):
    made = predictor(options=options, **{"height": 512, "width": 512, **size})
    assert not any(stage.estimated for stage in made.stages), made.notes
    return made


def test_stages_come_with_what_makes_them_up(sd15):
    made = _peaks(sd15)
    assert [stage.stage for stage in made.stages] == ["encode", "denoise", "decode"]
    for stage in made.stages:
        parts = stage.weights_bytes + stage.activation_bytes + stage.workspace_bytes + stage.graph_bytes
        assert stage.allocated_bytes == parts + stage.slack_bytes
        assert 0 <= stage.slack_bytes < 64 * MIB
        assert stage.reserved_bytes >= stage.allocated_bytes
        assert stage.least_bytes >= stage.allocated_bytes
    assert made.stage("denoise").weights_bytes == read_pipeline(sd15.pipe).parameter_bytes
    assert made.peak.stage == "decode"
    assert made.needed_bytes == max(int(made.peak_bytes * 1.05), int(made.least_bytes * 1.03))
    assert made.needed_bytes == made.as_estimate().needed_bytes < made.peak_bytes * 1.09


def test_graphs_stay_between_pictures_where_nothing_is_streamed(sd15):
    whole, more = (
        _peaks(sd15, opt.PartialOffload(resident_bytes=size), opt.CUDAGraphs()).stages for size in (None, 10 * 2**30)
    )
    assert whole == more


def test_with_more_room_no_plan_is_slower(sd15):
    """Where the denoiser has room, but not its graphs, streaming a part of it inside a graph is faster still."""
    plans = [
        plan(sd15.pipe, H100, vram_budget=int(room * 2**30), exact=True, estimates=sd15.estimate)
        for room in (1.8, 1.85, 1.9, 1.95, 2.0)
    ]
    assert all("enable_cuda_graphs" in [step.action for step in made.steps] for made in plans)
    seconds = [min(way.added_seconds for way in made.alternatives if way.fits) for made in plans]
    assert seconds == sorted(seconds, reverse=True)


@pytest.mark.parametrize("room", [0.45, 0.5, 0.6])
def test_components_come_by_layers_where_that_leaves_room_for_graphs(sd15, room):
    """Whole components leave no room for graphs, where they fit at all, and take longer."""
    made = plan(sd15.pipe, H100, vram_budget=int(room * 2**30), estimates=sd15.estimate)
    steps = {step.action: step.options for step in made.steps}
    assert steps["enable_partial_offload"]["by_layers"]
    assert "enable_cuda_graphs" in steps
    whole = [way for way in made.alternatives if way.fits and "by_layers" not in "".join(way.switches)]
    assert all(way.lean for way in whole)
    fastest = min(way.added_seconds for way in made.alternatives if way.fits)
    assert all(fastest < way.added_seconds / 1.5 for way in whole)


def test_a_step_in_slices_takes_what_so_many_samples_do(sd15):
    """Weights, what is held of all pictures, and the activations of one slice."""

    def held(batch, *options):
        return _peaks(sd15, *options, batch_size=batch).stage("denoise").activation_bytes

    single = held(1)
    assert held(8) > 7 * single
    assert single < held(8, opt.DenoiserSlicing(slice_size=2)) < 1.25 * single
    assert held(1, opt.DenoiserSlicing()) < 0.6 * single
    graphs, sliced = (
        _peaks(sd15, opt.CUDAGraphs(), *more, batch_size=8).stage("denoise").graph_bytes
        for more in ((), (opt.DenoiserSlicing(slice_size=2),))
    )
    assert sliced < graphs / 6
    decodes = [_peaks(sd15, *more).stage("decode") for more in ((), (opt.DenoiserSlicing(),))]
    assert decodes[0].activation_bytes == decodes[1].activation_bytes
    # taken back again, and there without being asked for where the pipeline has it on
    assert held(8) > 7 * single
    pipe = turbo(tiny.sd())
    before = predict_memory(pipe, height=64, width=64, batch_size=4)
    pipe.enable_denoiser_slicing()
    after = predict_memory(pipe, height=64, width=64, batch_size=4)
    assert after.stage("denoise").activation_bytes < before.stage("denoise").activation_bytes / 4


@pytest.mark.parametrize(("side", "batch", "room"), [(1024, 1, 0.486), (512, 32, 1.0)])
def test_slices_make_room_where_nothing_else_does(sd15, side, batch, room):
    """A picture of 1024 pixels on a card of 1 GB, and 32 of 512 on one of 1.5, less a CUDA context; with graphs."""
    made = plan(
        sd15.pipe,
        H100,
        height=side,
        width=side,
        batch_size=batch,
        vram_budget=int(room * 2**30),
        estimates=sd15.estimate,
    )
    assert (made.fits, made.exact) == (True, True)
    steps = {step.action: step for step in made.steps}
    assert {"enable_denoiser_slicing", "enable_cuda_graphs"} <= set(steps)
    assert f"of {2 * batch} samples at a time: the pipeline needs" in steps["enable_denoiser_slicing"].reason
    fitting = [way for way in made.alternatives if way.fits]
    assert fitting
    assert all("enable_denoiser_slicing" in way.name for way in fitting)


def test_naive_attention_holds_the_scores_and_slices_bound_them(thin):
    def held(option):
        return _peaks(thin, option).stage("denoise").activation_bytes

    fused, naive = held(opt.SDPAAttention()), held(opt.NaiveAttention())
    # scores and softmax of 2 samples, 4 heads, 4096 tokens, in 4 bytes
    scores = 2 * 2 * 4 * 4096**2 * 4
    assert scores < naive < scores + fused
    # and which of them are -inf, in a byte each, for both samples
    assert held(opt.SDPAAttention(backend="math")) == pytest.approx(naive + scores // 8, rel=0.01)
    assert scores // 8 < held(opt.SlicedAttention(slice_size="max")) < scores // 8 + fused
    assert fused <= held(opt.SlicedAttention(max_bytes=2**24)) <= fused + 2**24
    assert held(opt.XFormersAttention()) == pytest.approx(fused, rel=0.01)


def test_tiles_of_all_sizes_are_thrown_on_one_skeleton_and_taken_back(thin):
    predictor = Predictor(thin.pipe)
    peaks = {}
    for size in (None, 512, 256, None, 512):
        options = [opt.VAETiling(tile_size=size)] if size else []
        found = predictor(height=1024, width=1024, options=options).stage("decode").allocated_bytes
        assert peaks.setdefault(size, found) == found
    assert peaks[256] < peaks[512] < peaks[None]
    (prepared,) = predictor._prepared.values()
    assert not prepared.skeleton.pipe.vae.use_tiling
    assert "tiled_decode" not in vars(prepared.skeleton.pipe.vae)


def test_exact_tiles_hold_two_fifths_of_a_decode_or_less():
    predictor, found, closed = Predictor("sdxl"), [], []
    for options in ([], *([tiles] for tiles in EXACT_TILES)):
        stage = predictor(options=options).stage("decode")
        assert not stage.estimated
        found.append(stage.activation_bytes + stage.workspace_bytes)
        estimate = estimate_memory(read_pipeline(predictor.pipe), 1024, 1024, 1, options).stage("decode")
        closed.append(estimate.activation_bytes + estimate.workspace_bytes)
    assert found[1] < found[0] / 4
    assert found[2] < found[0] / 11
    assert found[3] < found[2]
    for ours, theirs in zip(closed, found, strict=True):
        assert 0.95 * theirs < ours < 1.25 * theirs


def test_slices_and_tiles_of_the_vae(thin):
    one, four = _peaks(thin).stage("decode"), _peaks(thin, batch_size=4).stage("decode")
    assert four.activation_bytes == pytest.approx(4 * one.activation_bytes, rel=0.01)
    assert four.workspace_bytes > 2 * one.workspace_bytes
    sliced = _peaks(thin, opt.VAESlicing(), batch_size=4).stage("decode")
    assert one.activation_bytes < sliced.activation_bytes < one.activation_bytes + 16 * MIB
    tiled = _peaks(thin, opt.VAETiling(tile_size=256)).stage("decode")
    assert tiled.activation_bytes < one.activation_bytes * 0.6
    assert _peaks(thin, opt.VAETiling(tile_size=512)).stage("decode").activation_bytes == one.activation_bytes


def test_formats(sd15):
    plain = _peaks(sd15)
    last = _peaks(sd15, opt.ChannelsLast())
    assert last.stage("decode").workspace_bytes < plain.stage("decode").workspace_bytes
    fused = _peaks(sd15, opt.FusedQKV())
    # larger tensors leave other gaps in the allocator's segments
    added = fused.stage("denoise").weights_bytes - plain.stage("denoise").weights_bytes
    assert abs(added) <= 4 * MIB


def test_each_offload_holds_what_it_says(sd15):
    denoise = {
        name: _peaks(sd15, option).stage("denoise")
        for name, option in {
            "none": opt.TF32(),
            "model": opt.ModelOffload(),
            "blocks": opt.GroupOffload(num_blocks_per_group=1),
            "leaves": opt.GroupOffload(offload_type="leaf_level"),
            "stream": opt.GroupOffload(offload_type="leaf_level", use_stream=True),
            "half": opt.PartialOffload(resident_bytes=read_pipeline(sd15.pipe).component("unet").parameter_bytes // 2),
            "sequential": opt.SequentialOffload(),
        }.items()
    }
    facts = read_pipeline(sd15.pipe)
    unet = facts.component("unet")
    weights = {name: stage.weights_bytes for name, stage in denoise.items()}
    assert weights["none"] == facts.parameter_bytes
    assert weights["model"] == unet.parameter_bytes
    assert max(map(max, unet.block_bytes)) <= weights["blocks"] < unet.parameter_bytes / 2
    assert weights["sequential"] == weights["leaves"] <= unet.largest_leaf_bytes
    assert weights["leaves"] <= weights["stream"] <= 2 * unet.largest_leaf_bytes
    half = unet.parameter_bytes // 2
    assert half < weights["half"] <= half + 2 * unet.largest_leaf_bytes
    order = ("none", "model", "half", "blocks", "stream", "sequential")
    sizes = [denoise[name].allocated_bytes for name in order]
    assert sizes == sorted(sizes, reverse=True)
    assert len({stage.activation_bytes for stage in denoise.values()}) <= 3  # when it peaks may shift, not what runs


def test_graphs_keep_pools_and_inputs(sd15):
    eager, graphs = _peaks(sd15), _peaks(sd15, opt.CUDAGraphs())
    denoise = graphs.stage("denoise")
    assert denoise.graph_bytes >= eager.stage("denoise").activation_bytes
    # the pools of UNet and decoder stay, each of the size of what runs in it
    assert graphs.reserved_bytes > eager.reserved_bytes + 128 * MIB
    projected = _peaks(sd15, opt.CUDAGraphs(), opt.PromptProjections())
    layers = [m for m in sd15.pipe.unet.modules() if getattr(m, "is_cross_attention", False)]
    size = sum(2 * layer.inner_kv_dim for layer in layers) * 77 * 2 * 2
    more = projected.stage("denoise").allocated_bytes - denoise.allocated_bytes
    assert 2 * size <= more <= 2 * size + 4 * MIB, "made once, and a graph's own copy of it"
    once = _peaks(sd15, opt.PromptProjections()).stage("denoise").allocated_bytes
    assert size <= once - eager.stage("denoise").allocated_bytes <= size + 2 * MIB


def test_sdxl_decodes_in_float32_and_a_copy_stays():
    predictor = Predictor(shrunk("sdxl", dtype=torch.float16, device="meta"))
    size = {"height": 256, "width": 256}
    vae = read_pipeline(predictor.pipe).component("vae").parameter_bytes
    plain, copied = predictor(**size), predictor(options=[opt.VAEUpcastCopy()], **size)
    resting = plain.stage("denoise").weights_bytes
    assert plain.stage("decode").weights_bytes == resting + vae
    assert copied.stage("decode").weights_bytes == resting + 2 * vae
    parts = predictor.pipe.components
    edited = predict_memory(diffusers.StableDiffusionXLImg2ImgPipeline(**parts), options=[opt.VAEUpcastCopy()], **size)
    assert edited.stage("decode").weights_bytes == resting + 2 * vae, "one copy serves encode and decode"
    fixed = Predictor(shrunk("sdxl-fp16-vae", dtype=torch.float16, device="meta"))(**size)
    assert fixed.stage("decode").activation_bytes == pytest.approx(plain.stage("decode").activation_bytes / 2, rel=0.1)
    assert fixed.stage("decode").weights_bytes == resting
    offloaded = predictor(options=[opt.ModelOffload()], **size).stage("decode")
    assert offloaded.weights_bytes == 2 * vae


def test_half_precision_halves():
    predictor = Predictor(tiny.sd())
    full, half = (predictor(height=512, width=512, options=given) for given in ((), [opt.HalfPrecision()]))
    for name in ("weights_bytes", "activation_bytes"):
        assert getattr(half.peak, name) == pytest.approx(getattr(full.peak, name) / 2, rel=0.05)


@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl", "sd3", "flux", "pixart"])
def test_every_architecture_runs_in_all_stages(name):
    made = predict_memory(shrunk(name, dtype=torch.float16, device="meta"), height=64, width=64)
    assert not any(stage.estimated for stage in made.stages), made.notes
    assert made.operators > 100


def test_pictures_and_controlnets_are_counted():
    parts = tiny.sd().components
    size = {"height": 256, "width": 256}
    plain = predict_memory(diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False), **size)
    edited = predict_memory(diffusers.StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False), **size)
    assert [stage.stage for stage in edited.stages] == ["encode", "vae_encode", "denoise", "decode"]
    assert edited.as_estimate().stage("encode").peak_bytes >= edited.stage("vae_encode").weights_bytes
    with torch.device("meta"):
        net = diffusers.ControlNetModel.from_unet(parts["unet"], load_weights_from_unet=False)
    made = {}
    for count in (1, 2):
        kind = diffusers.StableDiffusionControlNetPipeline
        pipe = kind(**parts, controlnet=[net] * count, requires_safety_checker=False)
        made[count] = predict_memory(pipe, **size)
        assert not any(stage.estimated for stage in made[count].stages), made[count].notes
    activations = [item.stage("denoise").activation_bytes for item in (plain, made[1], made[2])]
    assert activations == sorted(activations)
    assert activations[0] < activations[2]


class StrangeUNet(diffusers.UNet2DConditionModel):
    """A denoiser of a class nobody knows."""


def test_an_unknown_network_falls_back_and_says_so():
    pipe = tiny.sd()
    pipe.unet.__class__ = StrangeUNet
    made = predict_memory(pipe, height=64, width=64)
    assert [stage.stage for stage in made.stages if stage.estimated] == ["denoise"]
    assert "denoise is the closed-form estimate: what a StrangeUNet is called with is not known" in made.notes
    assert "denoise: " in made.explain()
    assert "ESTIMATED" in made.explain()
    assert made.margin == 0.15
    closed = estimate_memory(read_pipeline(pipe), 64, 64).stage("denoise")
    # beside it lies what the prompt became
    assert 0 <= made.stage("denoise").activation_bytes - closed.activation_bytes < 2**15


def test_a_network_that_fails_on_its_inputs_falls_back_and_says_why(monkeypatch):
    def fail(*_):
        raise RuntimeError("a tensor of another shape\nwas expected")

    monkeypatch.setattr(stages, "denoiser_inputs", fail)
    made = predict_memory(tiny.sd(), height=64, width=64)
    assert any("RuntimeError: a tensor of another shape was expected" in note for note in made.notes)


def test_a_quantised_component_is_counted_and_not_run():
    pipe = tiny.sd()
    pipe.unet.hf_quantizer = type("Quantizer", (), {"quantization_config": {"quant_method": "bitsandbytes"}})()
    made = predict_memory(pipe, height=64, width=64)
    assert "its weights are quantised (bitsandbytes)" in made.stage("denoise").estimated
    assert made.stage("denoise").weights_bytes == read_pipeline(pipe).parameter_bytes


def test_every_action_is_taken_into_account():
    groups = [*ON_SKELETON, *ON_VAE, *ON_DENOISER, *ATTENTION, *IN_REPLAY, *NO_DIFFERENCE, *AS_PLAIN]
    assert sorted(kind.action for kind in groups) == sorted(ACTIONS)


def test_what_is_predicted_as_if_off_is_said():
    made = predict_memory(tiny.sd(), height=64, width=64, options=[opt.CompileUNet(), opt.SharedGuidance()])
    assert any("compiled code is predicted as eager code, not measured" in note for note in made.notes)
    assert any("shared guidance is predicted as the whole batch" in note for note in made.notes)
    assert made.margin == 0.15


def test_what_is_on_already_is_counted():
    pipe = turbo(tiny.sd())
    size = {"height": 256, "width": 256, "batch_size": 4}
    plain = predict_memory(pipe, **size)
    pipe.enable_vae_slicing()
    assert predict_memory(pipe, **size).peak_bytes < plain.peak_bytes
    assert "VAESlicing()" in predict_memory(pipe, **size).facts["options"]
    pipe.disable_vae_slicing()
    pipe.enable_model_cpu_offload(device="cpu")
    offloaded = predict_memory(pipe, **size)
    assert offloaded.stage("denoise").weights_bytes == read_pipeline(pipe).component("unet").parameter_bytes
    pipe.disable_offload()
    assert predict_memory(pipe, **size).peak_bytes == plain.peak_bytes


def test_levels_never_measured_are_marked_and_get_a_wider_margin():
    there, elsewhere = (predict_memory(tiny.sd(), device=DeviceFacts.card(card)) for card in ("H100", "RTX 3060"))
    assert (there.measured, there.margin, there.notes) == (True, 0.05, ())
    assert (elsewhere.measured, elsewhere.margin) == (False, 0.15)
    assert "workspaces were never measured on SM level 8.6" in elsewhere.notes[0]
    # cuBLAS's workspace is known from its source, level by level
    assert workspaces_of((9, 0)).cublas_bytes == 32 * MIB
    assert workspaces_of((8, 6)).cublas_bytes == 8519680


def test_full_size_sdxl_takes_one_run_of_each_network_and_no_memory(monkeypatch):
    pipe = measured("sdxl", torch.float16, text_encoders=True)
    calls = []
    inner = nn.Module._call_impl

    def counted(self, *args, **kwargs):
        if type(self).__name__ in ("UNet2DConditionModel", "Decoder", "CLIPTextModel", "CLIPTextModelWithProjection"):
            calls.append(type(self).__name__)
        return inner(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "_call_impl", counted)
    predictor = Predictor(pipe)
    made = predictor(height=1024, width=1024)
    # what takes under 2 s on one core: some 8000 operators, each of the networks once
    assert made.operators < 10_000
    assert sorted(set(calls)) == ["CLIPTextModel", "CLIPTextModelWithProjection", "Decoder", "UNet2DConditionModel"]
    assert calls.count("UNet2DConditionModel") == calls.count("Decoder") == 1
    for options in ([opt.ModelOffload()], [opt.SequentialOffload()], [opt.CUDAGraphs()]):
        predictor(height=1024, width=1024, options=options)
    assert calls.count("UNet2DConditionModel") == calls.count("Decoder") == 1, "offload and graphs only replay"
    predictor(height=1024, width=1024, options=[opt.VAETiling(tile_size=512)])
    assert calls.count("UNet2DConditionModel") == 1, "a switch of the VAE runs the VAE alone"


def test_plans_can_be_made_from_predictions():
    exact = Predictor(tiny.sd(), device=H100)
    size = {"height": 256, "width": 256}
    made = plan(exact.pipe, H100, **size, estimates=exact.estimate)
    taken = [opt.SDPAAttention(), *(step.typed_options() for step in made.steps)]
    predicted = exact(options=taken, **size)
    assert made.after.peak_bytes == predicted.peak_bytes
    assert made.after.margin == predicted.margin
    tight = plan(exact.pipe, H100, **size, vram_budget=predicted.needed_bytes - 1, estimates=exact.estimate)
    assert any("offload" in step.action for step in tight.steps)
    assert tight.fits
    assert tight.after.needed_bytes < predicted.needed_bytes


def test_left_out_components_are_never_touched():
    pipe = tiny.sd()
    pipe.unet.hf_quantizer = type("Quantizer", (), {"quantization_config": {"quant_method": "bitsandbytes"}})()
    strides = {name: weight.stride() for name, weight in pipe.unet.named_parameters()}
    made = predict_memory(pipe, height=64, width=64, options=[opt.ChannelsLast(), opt.HalfPrecision()])
    assert made.stage("denoise").estimated
    assert {name: weight.stride() for name, weight in pipe.unet.named_parameters()} == strides
    assert {weight.dtype for weight in pipe.unet.parameters()} == {torch.float32}


def test_as_text_and_as_data(sd15):
    made = _peaks(sd15, opt.VAESlicing())
    text = made.explain()
    for part in ("StableDiffusionPipeline", "512x512", "VAESlicing()", "allocator slack"):
        assert part in text
    assert "PYTORCH_CUDA_ALLOC_CONF unset" in text
    data = json.loads(made.to_json())
    assert [stage["stage"] for stage in data["stages"]] == ["encode", "denoise", "decode"]
    assert data["stages"][2]["allocated_bytes"] == made.peak_bytes


def test_bad_input_is_refused():
    with pytest.raises(InvalidOptionError, match="an architecture|architecture = 'sd16'"):
        predict_memory("sd16")
    with pytest.raises(NotSupportedError, match="facts, which hold no networks to run"):
        predict_memory(read_pipeline(tiny.sd()))
    with pytest.raises(NotSupportedError, match="a diffusers pipeline"):
        predict_memory(nn.Linear(2, 2))
    with pytest.raises(InvalidOptionError, match="options such as VAESlicing"):
        predict_memory(tiny.sd(), options=["enable_vae_slicing"])
    with pytest.raises(InvalidOptionError, match="a multiple of 8"):
        predict_memory(tiny.sd(), height=100, width=64)
