"""The full-size models made from config: the published sizes, sound pictures, and nothing left behind."""

from __future__ import annotations

import functools
import inspect
import socket
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL

from diffusers_turbo.bench.architectures import ARCHITECTURES, build, find
from diffusers_turbo.bench.parts import Part, make_part
from diffusers_turbo.bench.text_encoders import CLIP_END, CLIP_L, CLIP_START, T5_XXL, clip_tokenizer, t5_tokenizer
from diffusers_turbo.errors import InvalidOptionError
from tests.bench import shrunk

CPU = torch.device("cpu")

# Parameters of the published weights, and where the number stands.
NUM_PARAMETERS = "https://github.com/huggingface/diffusers/blob/main/src/diffusers/models/modeling_utils.py"
MII = "https://github.com/microsoft/DeepSpeed-MII"  # README, "SD param count"
STABILITY = "https://github.com/Stability-AI/stablediffusion"  # prints "DiffusionWrapper has 865.91 M params"
OPEN_CLIP = (
    "https://github.com/mlfoundations/open_clip/blob/main/docs/model_profile.csv"  # text: 123.65, 354.03, 694.66 M
)
SDXL_PAPER = "https://arxiv.org/abs/2307.01952"  # table 1: UNet 2.6B, text encoders 817M
AITUNE = "https://github.com/ai-dynamo/aitune/blob/main/docs/guides/aot_inspect.md"  # all of SD3 medium
FLUX_CARD = "https://huggingface.co/black-forest-labs/FLUX.1-dev"  # 12B; 23.8 GB of bfloat16
PIXART_PAPER = "https://arxiv.org/abs/2310.00426"  # 0.6B
# OpenCLIP's ViT-H has a layer and a projection more, and a number that scales its loss
VIT_H = 354_032_641 - (12 * 1024**2 + 13 * 1024) - 1024**2 - 1
PUBLISHED = [
    ("sd15", "unet", 859_520_964, NUM_PARAMETERS),
    ("sd15", "vae", 83_653_863, MII),
    ("sd15", "text_encoder", 123_060_480, MII),
    ("sd21", "unet", 865_910_724, STABILITY),
    ("sd21", "text_encoder", VIT_H, OPEN_CLIP),
    ("sdxl", "unet", 2_567_463_684, SDXL_PAPER),
    ("sdxl", "vae", 83_653_863, MII),
    ("sdxl-fp16-vae", "unet", 2_567_463_684, SDXL_PAPER),
    ("sdxl-fp16-vae", "vae", 83_653_863, MII),
    ("sdxl", "text_encoder", 123_060_480, MII),
    ("sdxl", "text_encoder_2", 694_659_840, OPEN_CLIP),
    ("sd3", "transformer", 2_028_328_000, AITUNE),
    ("sd3", "text_encoder", 123_650_304, OPEN_CLIP),
    ("sd3", "text_encoder_2", 694_659_840, AITUNE),
    ("flux", "transformer", 11_901_408_320, FLUX_CARD),
    ("flux", "text_encoder", 123_060_480, MII),
    ("flux", "text_encoder_2", 4_762_310_656, AITUNE),
    ("pixart", "transformer", 611_349_152, PIXART_PAPER),
    ("pixart", "text_encoder", 4_762_310_656, AITUNE),
]


@functools.cache
def on_meta(name: str) -> Any:
    return build(name, dtype=torch.float16, device="meta")


@pytest.mark.parametrize(("name", "component", "parameters"), [row[:3] for row in PUBLISHED])
def test_every_model_has_the_parameters_of_the_published_one(name, component, parameters):
    module = getattr(on_meta(name), component)
    assert sum(parameter.numel() for parameter in module.parameters()) == parameters


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_on_meta_nothing_but_shapes_in_the_dtype_asked_for(name):
    pipe, architecture = on_meta(name), find(name)
    for component in (*architecture.models, *(key for key, part in architecture.text_encoders.items() if part)):
        module = getattr(pipe, component)
        assert {parameter.device.type for parameter in module.parameters()} == {"meta"}
        kept = {torch.float16, torch.float32} if type(module).__name__ == "T5EncoderModel" else {torch.float16}
        assert {parameter.dtype for parameter in module.parameters()} == kept


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_size_and_steps_are_the_pipelines_own_defaults(name):
    pipe, architecture = on_meta(name), find(name)
    assert architecture.name == name
    denoiser = next(key for key in architecture.models if key != "vae")
    side = getattr(pipe, "default_sample_size", None) or getattr(pipe, denoiser).config.sample_size
    assert architecture.size_px == side * pipe.vae_scale_factor
    assert architecture.steps == inspect.signature(type(pipe).__call__).parameters["num_inference_steps"].default
    assert all(source.startswith("https://") for source in architecture.sources)


def test_what_sets_the_models_apart():
    assert on_meta("sd21").scheduler.config.prediction_type == "v_prediction"
    assert on_meta("sd21").unet.config.upcast_attention
    assert on_meta("sdxl").vae.config.force_upcast
    assert not on_meta("sdxl-fp16-vae").vae.config.force_upcast
    assert (on_meta("sd3").text_encoder_3, on_meta("sd3").tokenizer_3) == (None, None)
    assert "T5-XXL" in find("sd3").note
    assert on_meta("flux").scheduler.config.use_dynamic_shifting
    assert [on_meta(name).vae.config.latent_channels for name in ("sdxl", "sd3", "flux", "pixart")] == [4, 16, 16, 4]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_prompt_becomes_a_sound_picture_in_float16_without_a_network(name, monkeypatch):
    def refuse(*_):
        raise AssertionError("nothing may be downloaded")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    pipe = shrunk.build(name, dtype=torch.float16)
    pictures = shrunk.picture(pipe, "A photo of 日本, müde 🎈")
    assert pictures.shape == (1, 3, shrunk.SIDE, shrunk.SIDE)
    assert pictures.isfinite().all()
    assert pictures.std() > 0.01
    assert pipe._progress_bar_config == {"disable": True}
    assert getattr(pipe, "safety_checker", None) is None
    assert not torch.equal(shrunk.picture(pipe, "Another one"), pictures)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tables_in_a_model_are_as_exact_as_if_cast_from_float32(name):
    full, half = shrunk.build(name, text_encoders=False), shrunk.build(name, text_encoders=False, dtype=torch.bfloat16)
    for component in find(name).models:
        ours = dict(getattr(half, component).named_buffers())
        for key, buffer in getattr(full, component).named_buffers():
            torch.testing.assert_close(ours[key].float(), buffer.bfloat16().float(), atol=2**-8, rtol=0)


def test_weights_follow_the_seed_and_not_the_text_encoders():
    one, same, other = (shrunk.build("sd15", seed=seed).unet.conv_in.weight for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    bare = shrunk.build("sd15", seed=1, text_encoders=False)
    assert torch.equal(bare.unet.conv_in.weight, one)
    assert (bare.text_encoder, bare.tokenizer) == (None, None)


def test_random_state_and_default_dtype_are_given_back():
    before = torch.get_rng_state()
    shrunk.build("sd15", dtype=torch.bfloat16)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_default_dtype() == torch.float32
    broken = Part(library="diffusers", class_name="AutoencoderKL", config={"block_out_channels": (7,)})
    with pytest.raises(ValueError, match="must be divisible by num_groups"):
        make_part(broken, torch.float16, CPU)
    assert torch.get_default_dtype() == torch.float32


def test_a_part_is_made_in_its_dtype_and_never_in_float32_first(monkeypatch):
    seen = set()
    register = torch.nn.Module.register_parameter

    def watch(module, name, parameter):
        if parameter is not None:
            seen.add(parameter.dtype)
        register(module, name, parameter)

    monkeypatch.setattr(torch.nn.Module, "register_parameter", watch)
    made = make_part(shrunk.shrunk("sd15").models["vae"], torch.float16, CPU)
    assert isinstance(made, AutoencoderKL)
    assert not made.training
    assert seen == {torch.float16}


def test_t5_keeps_in_float32_what_loading_it_keeps_there():
    encoder = shrunk.shrunk("flux").text_encoders["text_encoder_2"]
    dtypes = {name: item.dtype for name, item in make_part(encoder, torch.float16, CPU).named_parameters()}
    assert {name for name, dtype in dtypes.items() if dtype == torch.float32} == {
        f"encoder.block.{block}.layer.1.DenseReluDense.wo.weight" for block in (0, 1)
    }
    assert {item.dtype for item in make_part(encoder, torch.bfloat16, CPU).parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(("name", "meant"), [("sd1.5", "sd15"), ("sdx", "sdxl"), ("pix-art", "pixart")])
def test_an_unknown_name_is_refused_with_a_guess(name, meant):
    with pytest.raises(InvalidOptionError, match=f"architecture = '{name}'.*one of sd15, .*did you mean '{meant}'"):
        build(name, dtype=torch.float16, device="meta")
    with pytest.raises(InvalidOptionError, match="choose one of these names"):
        build("midjourney", dtype=torch.float16, device="meta")


def test_clips_tokens_have_the_ids_of_its_own_vocabulary():
    tokenizer = clip_tokenizer()
    # "!" is the first of CLIP's bytes and "a" the 65th; at a word's end they stand 256 later
    assert tokenizer("a! ba").input_ids == [CLIP_START, 64 + 256, 0 + 256, 65, 64 + 256, CLIP_END]
    assert (tokenizer.eos_token_id, tokenizer.model_max_length) == (CLIP_L.config["eos_token_id"], 77)
    assert tokenizer.decode(tokenizer("a red cat").input_ids, skip_special_tokens=True) == "a red cat"


@pytest.mark.parametrize(("make", "encoder"), [(clip_tokenizer, CLIP_L), (t5_tokenizer, T5_XXL)])
@pytest.mark.parametrize("prompt", ["", "A photo", "Ünïcode — 日本語 🎈\t\n\0", "long " * 1000])
def test_any_prompt_is_read(make, encoder, prompt):
    tokenizer = make()
    ids = tokenizer(prompt, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    assert ids.shape == (1, 77)
    assert 0 <= int(ids.min()) <= int(ids.max()) < encoder.config["vocab_size"]
    assert tokenizer.eos_token_id in ids
    assert tokenizer.eos_token_id == encoder.config["eos_token_id"]
    assert tokenizer.pad_token_id == encoder.config["pad_token_id"]


def test_t5s_tokens_are_letters_and_the_rest_is_unknown():
    tokenizer = t5_tokenizer()
    assert tokenizer.convert_ids_to_tokens(tokenizer("Hi ü 日").input_ids) == [
        "▁",
        "H",
        "i",
        "▁",
        "ü",
        "▁",
        "<unk>",
        "</s>",
    ]
    assert len({tuple(tokenizer(text).input_ids) for text in ("a cat", "a dog", "A cat")}) == 3


def test_pooling_reads_the_end_token():
    encoder = make_part(shrunk.shrunk("sd15").text_encoders["text_encoder"], torch.float32, CPU)
    ids = clip_tokenizer()("a cat", padding="max_length", return_tensors="pt").input_ids
    end = ids[0].tolist().index(CLIP_END)
    assert end == 1 + len("acat")
    with torch.no_grad():
        output = encoder(ids)
    assert torch.equal(output.pooler_output, output.last_hidden_state[:, end])
