"""Where a turbo pipeline says that it computes: what diffusers says, without its search of every module."""

from __future__ import annotations

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from diffusers import DiffusionPipeline
from diffusers.hooks import group_offloading

from diffusers_turbo import modules, turbo
from diffusers_turbo.facts.pipeline import device_without_hooks
from tests import tiny

MODULES = ("unet", "vae", "text_encoder")


class Elsewhere:
    """Stands for a module's weights on a GPU that is not there."""

    device = torch.device("cuda", 1)


def _of_diffusers(pipe):
    return DiffusionPipeline._execution_device.fget(pipe)


@pytest.mark.parametrize("make", [tiny.sd, tiny.sdxl, tiny.pixart], ids=["sd", "sdxl", "pixart"])
def test_it_is_that_of_diffusers(make):
    pipe = turbo(make())
    assert pipe._execution_device == _of_diffusers(pipe) == torch.device("cpu")
    pipe.to("meta")
    assert pipe._execution_device == _of_diffusers(pipe) == torch.device("meta")


@pytest.mark.parametrize("name", ["unet", "text_encoder"])
def test_of_components_on_several_devices_it_is_the_accelerator(name, monkeypatch):
    pipe = turbo(tiny.sd())
    monkeypatch.setattr(getattr(pipe, name), "parameters", lambda: iter([Elsewhere]))
    assert pipe._execution_device == torch.device("cuda", 1)


def test_where_all_begin_on_one_accelerator_no_layer_is_asked(monkeypatch):
    pipe = turbo(tiny.sd())
    for name in MODULES:
        monkeypatch.setattr(getattr(pipe, name), "parameters", lambda: iter([Elsewhere]))
    monkeypatch.setattr(modules, "modules_in", lambda *roots: pytest.fail("searched"))
    assert pipe._execution_device == torch.device("cuda", 1)
    add_hook_to_module(pipe.unet, AlignDevicesHook("cuda:1"))
    assert device_without_hooks(pipe) is None


@pytest.mark.parametrize(
    "offload",
    [
        lambda pipe: [add_hook_to_module(pipe.components[name], AlignDevicesHook("cuda:1")) for name in MODULES],
        lambda pipe: pipe.unet.enable_group_offload(torch.device("cuda:1"), offload_type="leaf_level"),
    ],
    ids=["accelerate", "diffusers"],
)
def test_under_offload_its_hooks_are_asked(offload, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *args, **kwargs: self)  # to a GPU that is not there
    pipe = turbo(tiny.sd())
    offload(pipe)
    assert device_without_hooks(pipe) is None
    assert pipe._execution_device == _of_diffusers(pipe) == torch.device("cuda:1")


def test_a_call_searches_no_module_for_hooks(monkeypatch):
    pipe = turbo(tiny.sd())
    searched = []
    search = group_offloading._get_top_level_group_offload_hook
    monkeypatch.setattr(
        group_offloading, "_get_top_level_group_offload_hook", lambda module: searched.append(module) or search(module)
    )
    pipe("a prompt", num_inference_steps=1, output_type="latent")
    assert searched == []
    _of_diffusers(pipe)
    assert searched != []
