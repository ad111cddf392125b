from __future__ import annotations

import dataclasses

import pytest
import torch

from diffusers_turbo.errors import InvalidOptionError
from diffusers_turbo.planning.conflicts import SLOT_ORDER
from diffusers_turbo.planning.options import ACTIONS, HalfPrecision, dtype_name, make_options
from diffusers_turbo.planning.units import gib, parse_bytes


@pytest.mark.parametrize("action", ACTIONS)
def test_every_action_has_defaults_a_slot_and_its_exactness(action):
    options = make_options(action)
    assert options.action == action
    assert options.slot in SLOT_ORDER
    assert options.exact == (options.lossy_reason is None)
    assert make_options(action, **options.as_dict()) == options
    hash(options)
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.action = "other"


def test_lossy_docstrings_say_so_on_their_first_line():
    for options in ACTIONS.values():
        first = (options.__doc__ or "").splitlines()[0]
        assert options.exact != ("LOSSY" in first), options.action


@pytest.mark.parametrize(
    ("action", "arguments", "text"),
    [
        ("enable_sdpa", {"backend": "turbo"}, r"enable_sdpa\(backend='turbo'\).*needed: one of 'auto', 'flash'"),
        ("enable_attention_slicing", {"slice_size": 0}, "slice_size = 0; needed: .*a positive number of heads"),
        ("enable_attention_slicing", {"slice_size": "half"}, "slice_size = 'half'"),
        ("enable_attention_slicing", {"max_bytes": -1}, "max_bytes = -1; needed: a positive integer"),
        ("enable_half_precision", {"dtype": "float8"}, "dtype = 'float8'; needed: one of 'float16', 'bfloat16', None"),
        ("fuse_qkv_projections", {"unet": False, "vae": False}, "needed: the denoiser, the VAE or both"),
        ("fuse_qkv_projections", {"unet": 1}, "unet = 1; needed: True or False"),
        ("enable_fused_kernels", {"geglu": "yes"}, "geglu = 'yes'; needed: True or False"),
        ("enable_vae_tiling", {"tile_size": 0}, "tile_size = 0; needed: a positive multiple of 8"),
        ("enable_vae_tiling", {"tile_size": 100}, "tile_size = 100; needed: a positive multiple of 8"),
        ("enable_vae_tiling", {"tile_size": True}, "tile_size = True"),
        ("enable_vae_tiling", {"overlap": 0.9}, "overlap = 0.9; needed: a fraction from 0 to 0.5"),
        ("enable_model_cpu_offload", {"gpu_id": -1}, "gpu_id = -1; needed: a device number"),
        ("enable_sequential_cpu_offload", {"gpu_id": 1.5}, "gpu_id = 1.5"),
        ("enable_group_offload", {"offload_type": "leaf"}, "offload_type = 'leaf'; needed: one of 'block_level'"),
        ("enable_group_offload", {"num_blocks_per_group": 0}, "num_blocks_per_group = 0"),
        ("enable_group_offload", {"num_blocks_per_group": 2, "use_stream": True}, "needed: 1 with use_stream=True"),
        ("enable_group_offload", {"offload_type": "leaf_level", "num_blocks_per_group": 1}, "block_level"),
        ("enable_group_offload", {"record_stream": True}, "record_stream = True; needed: use_stream=True"),
        ("compile_unet", {"mode": "fast"}, "mode = 'fast'; needed: one of None, 'default'"),
        ("compile_vae", {"backend": ""}, "backend = ''; needed: the name of a torch.compile backend"),
        ("compile_transformer", {"mode": "max-autotune", "backend": "aot_eager"}, 'needed: backend="inductor"'),
        ("compile_unet", {"dynamic": "yes"}, "dynamic = 'yes'"),
        ("trace_unet", {"height": 100}, "height = 100; needed: a positive multiple of 8"),
        ("trace_unet", {"save_path": "a", "load_path": "b"}, "save_path or load_path, not both"),
        ("load_exported_unet", {"path": "unet.so"}, "path = 'unet.so'; needed: the path of a .pt2 file"),
        ("enable_spda", {}, r"no action of this name; needed: one of enable_sdpa"),
        ("enable_sdpa", {"backed": "flash"}, "no argument backed; needed: arguments among backend"),
        ("enable_tf32", {"on": True}, "no argument on; needed: no arguments"),
    ],
)
def test_impossible_options_are_refused_in_four_parts(action, arguments, text):
    with pytest.raises(InvalidOptionError, match=text) as caught:
        make_options(action, **arguments)
    assert "What to do: " in str(caught.value)


@pytest.mark.parametrize("given", [torch.float16, "float16", "fp16", "half", "torch.float16"])
def test_dtypes_are_named_as_torch_names_them(given):
    assert dtype_name(given) == "float16"
    assert HalfPrecision(dtype=given).dtype == "float16"


@pytest.mark.parametrize(
    ("text", "size"),
    [("6GB", 6 * 2**30), ("6 GiB", 6 * 2**30), ("1.5g", 3 * 2**29), ("512MB", 2**29), (1000, 1000), ("1000", 1000)],
)
def test_budgets_are_read(text, size):
    assert parse_bytes(text, name="vram_budget") == size


@pytest.mark.parametrize("text", ["6 apples", "", "-1GB", "GB", 0, -5, 1.5, True, "0GB"])
def test_wrong_budgets_are_refused(text):
    with pytest.raises(InvalidOptionError, match=r"vram_budget=.*no positive size in it.*\"6GB\""):
        parse_bytes(text, name="vram_budget")


def test_sizes_are_printed_for_people():
    assert (gib(3 * 2**29), gib(2**20)) == ("1.50 GiB", "1 MiB")
