"""What a layer can ask for around the attention itself: masks, norms, added keys, residual, scale, upcasts, fusion."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers.models import attention_processor as host

from diffusers_turbo.attention import NaiveAttnProcessor, SDPAAttnProcessor, SlicedAttnProcessor
from diffusers_turbo.attention.masks import attention_bias
from diffusers_turbo.errors import InvalidOptionError
from tests.attention.cases import every_processor_on_tiny_layers, layer
from tests.attention.reference import added_kv_reference, attention, distance, heads_of, linear, reference

B, N, M, C, HEADS = 2, 11, 7, 32, 4


def noise(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bias_shaped(*shape: int) -> torch.Tensor:
    """A mask as diffusers makes them: 0 where a token is seen, -10000 where it is not, the first one always seen."""
    hidden = noise(*shape, seed=4) > 0.3
    hidden[..., 0] = False
    return hidden * -10000.0


def agree(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return distance(found, wanted) < 1e-5


@every_processor_on_tiny_layers
@pytest.mark.parametrize(
    "mask_shape",
    [
        (B, M),
        (1, M),
        (B, 1, M),
        (1, 1, M),
        (B, N, M),
        (B * HEADS, 1, M),
        (B * HEADS, N, M),
        (B, 1, 1, M),
        (B, HEADS, N, M),
    ],
    ids=str,
)
@pytest.mark.parametrize("boolean", [False, True], ids=["added", "boolean"])
def test_masks(maker, mask_shape, boolean):
    attn = layer(cross_attention_dim=16)
    hidden, context, mask = noise(B, N, C), noise(B, M, 16), bias_shaped(*mask_shape)
    if len(mask_shape) == 2:
        full = mask[:, None, None]
    elif mask_shape[0] == B * HEADS:
        full = mask.view(B, HEADS, -1, M)
    else:
        full = mask if len(mask_shape) == 4 else mask[:, None]
    wanted = reference(attn, hidden, context, full)
    attn.set_processor(maker())
    assert agree(attn(hidden, context, attention_mask=mask == 0 if boolean else mask), wanted)


@every_processor_on_tiny_layers
def test_a_mask_may_be_wider_than_the_layer(maker):
    """fp32's lowest number is a common "not at all"; in fp16 it must not become -inf, which gives NaN on its own."""
    attn = layer(torch.float16)
    mask = torch.full((B, 1, N), torch.finfo(torch.float32).min)
    attn.set_processor(maker())
    assert attn(noise(B, N, C).half(), attention_mask=mask).isfinite().all()


@pytest.mark.parametrize("shape", [(B, M + 1), (3, 1, M), (B, N + 1, M), (B, 1, M - 1), (M,), (B, 3, N, M)], ids=str)
def test_a_mask_of_another_shape_is_refused(shape):
    with pytest.raises(InvalidOptionError, match=r"found a mask of shape .* needed: \[B, M\]"):
        attention_bias(torch.zeros(shape), B, HEADS, N, M, torch.float32)


PLAIN = {
    "self": {},
    "cross": {"cross_attention_dim": 16},
    "bias": {"bias": True, "out_bias": False},
    "group_norm": {"norm_num_groups": 4},
    "spatial_norm": {"spatial_norm_dim": 5},
    "cross_layer_norm": {"cross_attention_dim": 16, "cross_attention_norm": "layer_norm"},
    "cross_group_norm": {
        "cross_attention_dim": 16,
        "cross_attention_norm": "group_norm",
        "cross_attention_norm_num_groups": 4,
    },
    "residual": {"residual_connection": True},
    "rescale": {"residual_connection": True, "rescale_output_factor": 1.7},
    "unit_scale": {"scale_qk": False},
    "upcast_attention": {"upcast_attention": True},
    "upcast_softmax": {"upcast_softmax": True},
    "qk_layer_norm": {"qk_norm": "layer_norm"},
    "qk_rms_norm": {"qk_norm": "rms_norm"},
    "fewer_kv_heads": {"kv_heads": 2},
    "out_dim": {"out_dim": 24, "dim_head": 6},
}
FOUR_D = ("self", "group_norm", "spatial_norm", "residual", "rescale")


def called(name: str, dtype: torch.dtype = torch.float32):
    """A layer with one of the features, and arguments for it."""
    options = {"heads": HEADS, **PLAIN[name]}
    hidden = noise(B, C, 3, 5) if name in FOUR_D else noise(B, N, C)
    if "norm_num_groups" in options or "spatial_norm_dim" in options:
        options["eps"] = 1e-6
    width = 32 if name == "spatial_norm" else C
    attn = layer(dtype, query_dim=width, **options)
    context = noise(B, M, 16).to(dtype) if "cross_attention_dim" in options else None
    temb = noise(B, 5, 3, 5).to(dtype) if name == "spatial_norm" else None
    return attn, hidden.to(dtype), context, temb


@every_processor_on_tiny_layers
@pytest.mark.parametrize("name", PLAIN)
def test_features(maker, name):
    attn, hidden, context, temb = called(name)
    wanted = reference(attn, hidden, context, temb=temb)
    attn.set_processor(maker())
    arguments = {} if temb is None else {"temb": temb}
    assert agree(attn(hidden, context, **arguments), wanted)


@every_processor_on_tiny_layers
def test_images_in_channels_last(maker):
    attn = layer(norm_num_groups=4, residual_connection=True)
    hidden = noise(B, C, 3, 5)
    attn.set_processor(maker())
    wanted = attn(hidden)
    assert agree(attn(hidden.to(memory_format=torch.channels_last)), wanted)


ADDED_KV = {
    "plain": {},
    "only_cross": {"only_cross_attention": True},
    "cross_norm": {"cross_attention_norm": "group_norm", "cross_attention_norm_num_groups": 4},
}


def added_kv_layer(name: str, dtype: torch.dtype = torch.float32):
    return layer(dtype, bias=True, norm_num_groups=4, added_kv_proj_dim=16, **ADDED_KV[name])


@every_processor_on_tiny_layers
@pytest.mark.parametrize("name", ADDED_KV)
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_added_keys_and_values(maker, name, masked):
    attn, hidden, context = added_kv_layer(name), noise(B, C, 3, 5), noise(B, M, 16)
    mask = bias_shaped(B, 1, M) if masked else None
    keys = M if name == "only_cross" else M + 15
    full = torch.nn.functional.pad(mask, (0, keys - M))[:, None] if masked else None
    wanted = added_kv_reference(attn, hidden, context, full)
    attn.set_processor(maker())
    assert agree(attn(hidden, context, attention_mask=mask), wanted)


@every_processor_on_tiny_layers
def test_added_keys_without_a_context_come_from_the_states_before_the_norm(maker):
    attn = layer(bias=True, norm_num_groups=4, added_kv_proj_dim=C)
    hidden = noise(B, C, 3, 5)
    wanted = added_kv_reference(attn, hidden)
    attn.set_processor(maker())
    assert agree(attn(hidden), wanted)


JOINT = {"added_kv_proj_dim": 16, "out_context_dim": 16, "bias": True}


@every_processor_on_tiny_layers
@pytest.mark.parametrize("last", [False, True], ids=["", "context_pre_only"])
@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
def test_joint_attention(maker, last, fused):
    attn = layer(context_pre_only=last, qk_norm="rms_norm", **JOINT)
    if fused:
        attn.fuse_projections()
    hidden, context = noise(B, N, C), noise(B, M, 16)
    states = {"to": hidden, "add": context}
    projections = {"to": (attn.to_q, attn.to_k, attn.to_v), "add": (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)}
    norms = {"to": (attn.norm_q, attn.norm_k), "add": (attn.norm_added_q, attn.norm_added_k)}
    parts = []
    for side in ("to", "add"):
        query, key, value = (heads_of(linear(p, states[side]), HEADS) for p in projections[side])
        parts.append((norms[side][0](query), norms[side][1](key), value))
    joined = attention(*(torch.cat(pair, 2) for pair in zip(*parts, strict=True)), attn.scale)
    wanted = linear(attn.to_out[0], joined[:, :N])
    wanted_context = joined[:, N:] if last else linear(attn.to_add_out, joined[:, N:])

    attn.set_processor(maker())
    found, found_context = attn(hidden, encoder_hidden_states=context)
    assert agree(found, wanted)
    assert agree(found_context, wanted_context)


HOST = {
    "plain": [host.AttnProcessor, host.AttnProcessor2_0, lambda: host.SlicedAttnProcessor(3)],
    "added_kv": [host.AttnAddedKVProcessor, host.AttnAddedKVProcessor2_0, lambda: host.SlicedAttnAddedKVProcessor(3)],
    "joint": [host.JointAttnProcessor2_0],
}
# What diffusers' own processors leave out of a layer; ours do it, as the reference above shows.
IGNORED = {
    ("AttnProcessor", "qk_layer_norm"),
    ("AttnProcessor", "qk_rms_norm"),
    ("SlicedAttnProcessor", "qk_layer_norm"),
    ("SlicedAttnProcessor", "qk_rms_norm"),
    ("SlicedAttnProcessor", "spatial_norm"),
    ("AttnProcessor2_0", "unit_scale"),
    *((name, "fewer_kv_heads") for name in ("AttnProcessor", "AttnProcessor2_0", "SlicedAttnProcessor")),
}


@every_processor_on_tiny_layers
@pytest.mark.parametrize(
    ("theirs", "name"),
    [(t, name) for t in HOST["plain"] for name in PLAIN if (type(t()).__name__, name) not in IGNORED],
)
def test_agrees_with_diffusers_on_plain_layers(maker, theirs, name):
    attn, hidden, context, temb = called(name)
    mask = bias_shaped(B, 1, hidden[0, 0].numel() if hidden.ndim == 4 else (M if context is not None else N))
    arguments = {"attention_mask": mask} | ({} if temb is None else {"temb": temb})
    attn.set_processor(theirs())
    wanted = attn(hidden, context, **arguments)
    attn.set_processor(maker())
    assert agree(attn(hidden, context, **arguments), wanted)


@every_processor_on_tiny_layers
@pytest.mark.parametrize("theirs", HOST["added_kv"])
@pytest.mark.parametrize("name", ADDED_KV)
def test_agrees_with_diffusers_on_added_keys(maker, theirs, name):
    attn, hidden, context = added_kv_layer(name), noise(B, C, 3, 5), noise(B, M, 16)
    # diffusers pads the mask of the context as if the layer's own keys always followed.
    mask = None if name == "only_cross" else bias_shaped(B, 1, M)
    attn.set_processor(theirs())
    wanted = attn(hidden, context, attention_mask=mask)
    attn.set_processor(maker())
    assert agree(attn(hidden, context, attention_mask=mask), wanted)


@every_processor_on_tiny_layers
def test_agrees_with_diffusers_on_joint_layers(maker):
    attn = layer(context_pre_only=False, **JOINT)
    arguments = (noise(B, N, C), noise(B, M, 16))
    attn.set_processor(host.JointAttnProcessor2_0())
    wanted = attn(*arguments)
    attn.set_processor(maker())
    assert all(map(agree, attn(*arguments), wanted))


@pytest.mark.parametrize("name", [name for name in PLAIN if ("AttnProcessor2_0", name) not in IGNORED])
def test_sdpa_is_bit_identical_to_diffusers_default(name):
    attn, hidden, context, temb = called(name)
    arguments = {} if temb is None else {"temb": temb}
    attn.set_processor(host.AttnProcessor2_0())
    wanted = attn(hidden, context, **arguments)
    attn.set_processor(SDPAAttnProcessor())
    assert torch.equal(attn(hidden, context, **arguments), wanted)


@pytest.mark.parametrize("name", [name for name in PLAIN if ("AttnProcessor", name) not in IGNORED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_naive_is_bit_identical_to_diffusers_naive(name, dtype):
    attn, hidden, context, temb = called(name, dtype)
    arguments = {} if temb is None else {"temb": temb}
    attn.set_processor(host.AttnProcessor())
    wanted = attn(hidden, context, **arguments)
    attn.set_processor(NaiveAttnProcessor())
    assert torch.equal(attn(hidden, context, **arguments), wanted)


@pytest.mark.parametrize(
    "maker", [NaiveAttnProcessor, lambda: SlicedAttnProcessor(max_bytes=2048)], ids=["naive", "sliced"]
)
def test_upcasting_the_scores_keeps_fp16_from_overflowing(maker):
    """Scores beyond 65504 are inf in fp16, and their softmax NaN; `upcast_attention` is there for that."""
    for upcast in (False, True):
        attn = layer(torch.float16, upcast_attention=upcast, scale_qk=False)
        with torch.no_grad():
            attn.to_q.weight.mul_(150)
            attn.to_k.weight.mul_(150)
        attn.set_processor(maker())
        output = attn(noise(1, N, C).half())
        assert bool(output.isfinite().all()) is upcast
        if upcast:
            wide = copy.deepcopy(attn).float()
            assert distance(output, reference(wide, noise(1, N, C).half().float())) < 0.02


@every_processor_on_tiny_layers
@pytest.mark.parametrize("context_width", [None, 16], ids=["self", "cross"])
@torch.no_grad()
def test_fused_projections_are_used_and_an_adapter_is_never_bypassed(maker, context_width):
    attn = layer(bias=True, cross_attention_dim=context_width)
    hidden, context = noise(B, N, C), noise(B, M, 16) if context_width else None
    attn.set_processor(maker())
    wanted = attn(hidden, context)
    attn.fuse_projections()
    assert agree(attn(hidden, context), wanted)
    fused = attn.to_qkv if context_width is None else attn.to_kv
    fused.weight.zero_()
    assert not agree(attn(hidden, context), wanted)

    class Adapter(torch.nn.Module):
        """As LoRA wraps a projection: the fused copy knows nothing of it."""

        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, states):
            return self.base(states) * 1.5

    attn.to_v = Adapter(attn.to_v)
    unfused = copy.deepcopy(attn)
    unfused.fused_projections = False
    assert agree(attn(hidden, context), unfused(hidden, context))
    assert not agree(attn(hidden, context), wanted)


@every_processor_on_tiny_layers
def test_autocast(maker):
    attn = layer(cross_attention_dim=16, cross_attention_norm="layer_norm", qk_norm="layer_norm")
    hidden, context = noise(B, N, C), noise(B, M, 16)
    wanted = reference(attn, hidden, context)
    attn.set_processor(maker())
    with torch.autocast("cpu", torch.bfloat16):
        output = attn(hidden, context, attention_mask=torch.zeros(B, 1, M))
    assert distance(output, wanted) < 0.03


@every_processor_on_tiny_layers
def test_unknown_arguments_are_accepted(maker):
    attn, hidden = layer(), noise(B, N, C)
    wanted = maker()(attn, hidden)
    assert torch.equal(maker()(attn, hidden, None, None, None, 1.0, scale=2.0), wanted)
