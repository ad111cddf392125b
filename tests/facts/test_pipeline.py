from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from accelerate.hooks import CpuOffload, add_hook_to_module
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.attention_processor import AttnProcessor

from diffusers_turbo.bench.architectures import build
from diffusers_turbo.errors import NotSupportedError
from diffusers_turbo.facts.components import read_component
from diffusers_turbo.facts.pipeline import execution_device, read_pipeline, require_pipeline
from tests import tiny
from tests.planning.architectures import facts_of, sd15


def test_sd15_is_read_in_full_size():
    facts = facts_of("sd15")
    assert (facts.denoiser, facts.family, facts.native_dtype) == ("unet", "sd15", "float16")
    assert facts.denoiser_facts.dtype == "float16"
    assert facts.denoiser_facts.parameter_bytes == 859_520_964 * 2
    assert facts.denoiser_facts.devices == ("meta",)
    assert (facts.default_height, facts.vae_scale_factor, facts.guidance_copies) == (512, 8, 2)
    assert facts.shape.block_out_channels == (320, 640, 1280, 1280)
    assert facts.shape.attention_levels == (True, True, True, False)
    assert facts.processors == {"AttnProcessor2_0": 32}
    assert facts.scheduler == "DDIMScheduler"
    assert facts.refusals == ()


def test_attention_layers_are_counted_with_their_tokens():
    layers = [layer for layer in facts_of("sd15").attention if layer.component == "unet"]
    assert sum(layer.count for layer in layers) == 32
    shapes = {(layer.heads, layer.head_dim, layer.tokens(64, 64)) for layer in layers if not layer.cross}
    assert shapes == {(8, 40, 4096), (8, 80, 1024), (8, 160, 256), (8, 160, 64)}
    (vae,) = {(layer.heads, layer.head_dim) for layer in facts_of("sd15").attention if layer.component == "vae"}
    assert vae == (1, 512)


def test_sdxl_and_its_upcast_vae_are_recognised():
    facts = facts_of("sdxl")
    assert facts.family == "sdxl"
    assert facts.vae is not None
    assert facts.vae.force_upcast
    assert facts.vae.can_tile
    assert facts.default_width == 1024
    levels = {layer.level for layer in facts.attention if layer.component == "unet"}
    assert levels == {1, 2}


def test_a_vae_that_asks_for_float32_where_nobody_heeds_it():
    """The flag's default is True, so SD1.5's VAE has it; its pipeline decodes in float16 all the same."""
    pipe = sd15()
    assert pipe.vae.config.force_upcast
    assert not read_pipeline(pipe).vae.force_upcast


def test_flux_is_planned_at_its_pipelines_own_size():
    facts = read_pipeline(build("flux", dtype=torch.bfloat16, device="meta"))
    assert (facts.default_height, facts.size_multiple) == (1024, 16)


def test_a_transformer_is_recognised():
    facts = facts_of("pixart", "bfloat16")
    assert (facts.denoiser, facts.family, facts.native_dtype) == ("transformer", "transformer", "bfloat16")
    assert facts.shape.inner_dim == 16 * 72
    assert facts.size_multiple == 16


def test_facts_are_plain_data():
    data = json.loads(facts_of("sd15").to_json())
    assert data["components"][0]["name"]
    assert data["shape"]["kind"] == "unet"


def test_reading_changes_nothing(pipe):
    before = {name: (id(p), p._version) for name, p in pipe.unet.named_parameters()}
    attributes = {name: set(vars(part)) for name, part in pipe.components.items() if hasattr(part, "__dict__")}
    processors = {name: id(value) for name, value in pipe.unet.attn_processors.items()}
    assert read_pipeline(pipe) == read_pipeline(pipe)
    assert {name: (id(p), p._version) for name, p in pipe.unet.named_parameters()} == before
    assert {name: set(vars(part)) for name, part in pipe.components.items() if hasattr(part, "__dict__")} == attributes
    assert {name: id(value) for name, value in pipe.unet.attn_processors.items()} == processors


def test_tied_weights_are_counted_once():
    first, second = torch.nn.Linear(8, 8, bias=False), torch.nn.Linear(8, 8, bias=False)
    second.weight = first.weight
    facts = read_component("unet", "denoiser", torch.nn.Sequential(first, second))
    assert facts.parameter_bytes == 8 * 8 * 4
    view = torch.nn.Linear(8, 8, bias=False)
    view.weight = torch.nn.Parameter(first.weight.detach()[:4])
    assert read_component("unet", "denoiser", torch.nn.Sequential(first, view)).parameter_bytes == 8 * 8 * 4


def test_the_processors_in_force_are_counted(pipe):
    pipe.unet.set_attn_processor(AttnProcessor())
    assert set(read_pipeline(pipe).processors) == {"AttnProcessor"}


def test_what_was_done_already_is_seen(pipe):
    pipe.vae.enable_tiling()
    pipe.vae.enable_slicing()
    pipe.unet.compile(backend="eager")
    facts = read_pipeline(pipe)
    assert facts.vae is not None
    assert (facts.vae.tiling, facts.vae.slicing) == (True, True)
    assert facts.compiled == ("unet",)


def test_offload_hooks_of_both_systems_are_seen(pipe):
    # the hooks alone: offloading for real needs an accelerator with diffusers 0.38
    HookRegistry.check_if_exists_or_initialize(pipe.unet).register_hook(ModelHook(), "group_offloading")
    add_hook_to_module(pipe.vae, CpuOffload(execution_device="cpu"))
    assert read_pipeline(pipe).hooks == ("accelerate:CpuOffload", "diffusers:group_offloading")


def test_adapters_are_seen(pipe):
    from peft import LoraConfig

    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), adapter_name="style")
    assert read_pipeline(pipe).adapters == ("style",)


@pytest.mark.parametrize(
    ("mark", "reason"),
    [
        ({"hf_quantizer": SimpleNamespace(quantization_config=SimpleNamespace(quant_method="gguf"))}, "gguf"),
        ({"is_loaded_in_8bit": True}, "is_loaded_in_8bit"),
        ({"hf_device_map": {"": "cuda:0", "up": "cpu"}}, "device_map"),
    ],
)
def test_quantised_and_mapped_components_carry_a_reason(pipe, mark, reason):
    for name, value in mark.items():
        setattr(pipe.unet, name, value)
    (refusal,) = read_pipeline(pipe).refusals
    assert reason in refusal
    assert refusal.startswith("unet is")


def test_quantised_tensors_are_known_by_their_class():
    weight = type("GGUFParameter", (torch.nn.Parameter,), {})(torch.zeros(2, 2))
    layer = torch.nn.Linear(2, 2, bias=False)
    layer.weight = weight
    assert read_component("unet", "denoiser", layer).quantised == "gguf"


def test_a_non_pipeline_is_refused():
    with pytest.raises(
        NotSupportedError, match=r"turbo\(pipe\): found an object of type str; needed: a diffusers pipe"
    ):
        require_pipeline("pipe", "turbo(pipe)")


def test_a_pipeline_without_denoiser_is_refused(pipe):
    pipe.unet = None
    with pytest.raises(NotSupportedError, match=r"found no denoiser among its components \(.*vae.*needed: a component"):
        read_pipeline(pipe)


def test_an_unconditional_pipeline_is_read():
    unet = UNet2DModel(
        sample_size=16,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    facts = read_pipeline(DDPMPipeline(unet=unet, scheduler=DDPMScheduler()))
    assert (facts.vae, facts.vae_scale_factor, facts.default_height, facts.guidance_copies) == (None, 1, 16, 1)


def test_the_execution_device_is_where_it_computes(pipe):
    assert execution_device(pipe) == torch.device("cpu")
    assert execution_device(tiny.sd().to("meta")) == torch.device("cpu")
