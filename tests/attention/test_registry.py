"""Names, values, and which processors found on a model may be replaced."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys

import pytest
import torch
from diffusers.models import attention_processor as host

import diffusers_turbo.attention as package
from diffusers_turbo.attention import (
    PROCESSORS,
    SDPAAttnProcessor,
    SlicedAttnProcessor,
    TurboAttnProcessor,
    attention_layers,
    why_kept,
)
from tests import tiny
from tests.attention.cases import every_processor, layer


def test_public_names_are_there():
    assert all(hasattr(package, name) for name in package.__all__)


@pytest.mark.parametrize("name", PROCESSORS)
def test_each_is_a_class_of_its_own_that_needs_no_arguments(name):
    processor = PROCESSORS[name]()
    assert type(processor)() == processor  # as load_ip_adapter makes them
    assert type(processor).__module__.startswith("diffusers_turbo.attention")
    assert not any(base.__module__.startswith("diffusers.") for base in type(processor).__mro__)


@every_processor
def test_values(maker):
    processor = maker()
    for same in (copy.deepcopy(processor), pickle.loads(pickle.dumps(processor)), eval(repr(processor), vars(package))):
        assert type(same) is type(processor)
        assert same == processor
        assert hash(same) == hash(processor)
    assert processor != SlicedAttnProcessor("max", max_bytes=7)


def test_options_tell_processors_apart():
    assert SDPAAttnProcessor("flash") != SDPAAttnProcessor()
    assert repr(SDPAAttnProcessor("flash")) == "SDPAAttnProcessor(backend='flash')"
    assert repr(SlicedAttnProcessor()) == "SlicedAttnProcessor(slice_size='auto', max_bytes=None)"


@every_processor
def test_a_layer_with_one_can_be_copied_and_pickled(maker):
    attn, hidden = layer(), torch.randn(1, 5, 32)
    attn.set_processor(maker())
    wanted = attn(hidden)
    assert torch.equal(copy.deepcopy(attn)(hidden), wanted)
    assert torch.equal(pickle.loads(pickle.dumps(attn))(hidden), wanted)


def test_the_base_class_is_not_a_processor():
    with pytest.raises(TypeError, match="abstract"):
        TurboAttnProcessor()


def test_layers_of_a_model_by_name():
    vae = tiny.vae()
    assert list(attention_layers(vae)) == ["encoder.mid_block.attentions.0", "decoder.mid_block.attentions.0"]
    unet = tiny.unet()
    assert {f"{name}.processor" for name in attention_layers(unet)} == set(unet.attn_processors)
    assert attention_layers(torch.nn.Linear(2, 2)) == {}


class Custom(host.AttnProcessor2_0):
    """A user's own: a subclass may do anything."""


@pytest.mark.parametrize(
    ("processor", "kind"),
    [
        (host.AttnProcessor(), "plain"),
        (host.AttnProcessor2_0(), "plain"),
        (host.FusedAttnProcessor2_0(), "plain"),
        (host.SlicedAttnProcessor(1), "plain"),
        (host.XFormersAttnProcessor(), "plain"),
        (host.AttnAddedKVProcessor(), "added_kv"),
        (host.AttnAddedKVProcessor2_0(), "added_kv"),
        (host.SlicedAttnAddedKVProcessor(1), "added_kv"),
        (host.XFormersAttnAddedKVProcessor(), "added_kv"),
        (host.JointAttnProcessor2_0(), "joint"),
        (host.JointAttnProcessor2_0(), "plain"),
        (host.FusedJointAttnProcessor2_0(), "joint"),
        (host.XFormersJointAttnProcessor(), "joint"),
        *((maker(), kind) for maker in PROCESSORS.values() for kind in ("plain", "added_kv", "joint")),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_plain_attention_may_be_replaced(processor, kind):
    assert why_kept(processor) is None
    assert why_kept(processor, kind) is None


@pytest.mark.parametrize(
    ("processor", "reason"),
    [
        (Custom(), "Custom does more than plain attention"),
        (host.PAGIdentitySelfAttnProcessor2_0(), "PAGIdentitySelfAttnProcessor2_0 does more than plain attention"),
        (host.HunyuanAttnProcessor2_0(), "HunyuanAttnProcessor2_0 does more than plain attention"),
        (type("AttnProcessor", (), {})(), "AttnProcessor does more than plain attention"),
        (None, "NoneType does more than plain attention"),
        (
            host.IPAdapterAttnProcessor2_0(32, 16, num_tokens=(4,)),
            "IPAdapterAttnProcessor2_0 does more than plain attention and holds weights",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else type(value).__name__,
)
def test_anything_else_is_kept(processor, reason):
    assert why_kept(processor) == reason


@pytest.mark.parametrize(
    ("processor", "kind"),
    [(host.AttnProcessor2_0(), "joint"), (host.AttnAddedKVProcessor(), "plain"), (host.AttnProcessor(), "added_kv")],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_processor_on_a_layer_it_is_not_made_for_is_kept(processor, kind):
    assert why_kept(processor, kind) == f"{type(processor).__name__} runs a layer of kind {kind!r} in a way of its own"


def test_importing_imports_no_xformers_and_starts_no_gpu():
    code = """
import sys
from importlib import import_module
for name in ("alignment", "limits", "masks", "base", "naive", "sdpa", "sliced", "xformers", "registry"):
    import_module("diffusers_turbo.attention." + name)
import torch
assert "xformers" not in sys.modules or "diffusers.models.attention_processor" in sys.modules
assert not torch.cuda.is_initialized()
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env=environment)
