"""Limits are data with a source each, and reasons follow from them alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from diffusers_turbo.attention import (
    AttentionLayer,
    Limits,
    NaiveAttnProcessor,
    SDPAAttnProcessor,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
    read_layer,
    reasons_against,
)
from diffusers_turbo.attention.limits import layer_kind
from diffusers_turbo.attention.sdpa import BACKENDS
from tests.attention.cases import layer

ALL_LIMITS = [
    *NaiveAttnProcessor.limits,
    *SlicedAttnProcessor.limits,
    *XFormersAttnProcessor.limits,
    *(limits for variants in BACKENDS.values() for limits in variants),
]


def a_layer(**changes) -> AttentionLayer:
    sd15 = {"heads": 8, "head_dim": 40, "dtype": torch.float16, "device": torch.device("cuda"), "sm": (8, 6)}
    return AttentionLayer(**sd15 | changes)


@pytest.mark.parametrize("limits", ALL_LIMITS, ids=lambda limits: f"{limits.kernel}-{limits.devices}")
def test_every_number_has_a_source(limits):
    numbers = {
        field.name
        for field in dataclasses.fields(Limits)
        if field.name.startswith(("lowest", "largest")) and getattr(limits, field.name)
    }
    assert set(limits.sources) == numbers
    assert all(source.startswith("https://") for source in limits.sources.values())


CPU = {"device": torch.device("cpu"), "sm": None}
VAE = {"heads": 1, "head_dim": 512}


@pytest.mark.parametrize(
    ("processor", "changes", "reasons"),
    [
        (NaiveAttnProcessor(), VAE | CPU, []),
        (SDPAAttnProcessor(), VAE, []),
        (SDPAAttnProcessor("math"), VAE | {"dtype": torch.float32, "device": torch.device("mps"), "sm": None}, []),
        (SDPAAttnProcessor("flash"), {}, []),
        (SDPAAttnProcessor("flash"), CPU | {"dtype": torch.float32, "masked": True} | VAE, []),
        (SDPAAttnProcessor("flash"), VAE, ["SDPA flash takes heads up to 256, the layer has 512"]),
        (SDPAAttnProcessor("flash"), {"masked": True}, ["SDPA flash takes no mask, the layer is given one"]),
        (SDPAAttnProcessor("flash"), {"sm": (7, 5)}, ["SDPA flash in float16 needs SM 8.0, the GPU has 7.5"]),
        (
            SDPAAttnProcessor("flash"),
            {"dtype": torch.float32},
            ["SDPA flash takes float16 or bfloat16, the layer is float32"],
        ),
        (
            SDPAAttnProcessor("flash"),
            {"device": torch.device("mps"), "sm": None},
            ["SDPA flash runs on cpu or cuda, the layer is on mps"],
        ),
        (SDPAAttnProcessor("efficient"), VAE | {"sm": (6, 1), "masked": True}, []),
        (
            SDPAAttnProcessor("efficient"),
            {"sm": (7, 5), "dtype": torch.bfloat16},
            ["SDPA efficient in bfloat16 needs SM 8.0, the GPU has 7.5"],
        ),
        (SDPAAttnProcessor("efficient"), CPU, ["SDPA efficient runs on cuda, the layer is on cpu"]),
        (SDPAAttnProcessor("cudnn"), {"head_dim": 160}, ["SDPA cuDNN takes heads up to 128, the layer has 160"]),
        (SDPAAttnProcessor("cudnn"), {"head_dim": 160, "sm": (9, 0)}, []),
        (
            SDPAAttnProcessor("cudnn"),
            {"head_dim": 160, "sm": (9, 0), "grad": True},
            ["SDPA cuDNN has no gradient for heads above 128, the layer has 160"],
        ),
        (
            SDPAAttnProcessor("cudnn"),
            VAE | {"dtype": torch.float32, "sm": (7, 0)},
            [
                "SDPA cuDNN takes float16 or bfloat16, the layer is float32",
                "SDPA cuDNN in float32 needs SM 8.0, the GPU has 7.0",
                "SDPA cuDNN takes heads up to 128, the layer has 512",
            ],
        ),
        (XFormersAttnProcessor(), VAE | {"dtype": torch.float32, "sm": (6, 0)}, []),
        (XFormersAttnProcessor(), CPU, ["xFormers runs on cuda, the layer is on cpu"]),
        (SlicedAttnProcessor(8), {}, []),
        (SlicedAttnProcessor(9), {}, ["slices of 9 heads are more than the layer's 8"]),
    ],
    ids=str,
)
def test_reasons(processor, changes, reasons):
    assert processor.reasons(a_layer(**changes)) == reasons


def test_a_limit_left_out_is_no_limit():
    assert reasons_against([Limits(kernel="any")], a_layer(**VAE, masked=True, grad=True)) == []


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({}, "plain"),
        ({"added_kv_proj_dim": 16}, "added_kv"),
        ({"added_kv_proj_dim": 16, "context_pre_only": False}, "joint"),
        ({"added_kv_proj_dim": 16, "context_pre_only": True}, "joint"),
    ],
)
def test_reading_a_layer(options, kind):
    attn = layer(torch.bfloat16, heads=4, dim_head=12, cross_attention_dim=16, **options)
    found = read_layer("mid.attn", attn, masked=True)
    assert layer_kind(attn) == kind
    assert found == AttentionLayer(
        name="mid.attn",
        heads=4,
        head_dim=12,
        kind=kind,
        cross=True,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        masked=True,
    )
    assert read_layer("", attn, dtype=torch.float16).dtype == torch.float16


def test_reading_a_layer_whose_projection_is_wrapped():
    """An adapter around a projection need not have a weight of its own name."""
    attn = layer(torch.bfloat16)
    attn.to_q = torch.nn.Sequential(attn.to_q)
    assert read_layer("", attn).dtype == torch.bfloat16
