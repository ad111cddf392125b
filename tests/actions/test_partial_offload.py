"""Partial offload: which weights stay, how much is on the device at a time, and that nothing is left behind."""

from __future__ import annotations

import gc

import pytest
import torch
from peft import LoraConfig
from peft.functional import delete_adapter, inject_adapter_in_model
from torch import nn

from diffusers_turbo import TurboError, turbo
from diffusers_turbo.actions import layers, page_locked
from diffusers_turbo.actions.page_locked import PinnedMemory
from diffusers_turbo.actions.partial_offload import PartialResidency
from diffusers_turbo.actions.streaming import Window, extent, units_of, weights_of
from diffusers_turbo.planning.options import PartialOffload
from diffusers_turbo.planning.residents import aligned, window_sizes
from diffusers_turbo.planning.units import MIB
from tests import tiny
from tests.actions.streamed import EVERYTHING, Device, residency_of
from tests.state import differences, state_of

SIZES = (0, 100_000, 700_000, 1_500_000, EVERYTHING)


@pytest.fixture
def device(monkeypatch):
    return Device(monkeypatch)


@pytest.mark.parametrize(("leaves", "prefetch"), [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("resident_bytes", SIZES)
@pytest.mark.parametrize("make", [tiny.sd, tiny.sdxl, tiny.pixart], ids=["sd", "sdxl", "pixart"])
def test_pictures_to_the_bit_and_undo(make, resident_bytes, leaves, prefetch):
    pipe = turbo(make())
    stock, before = tiny.picture(pipe, steps=3), state_of(pipe)
    # "cpu:0" is not "cpu": weights that stay are copies, as on a GPU
    pipe.enable_partial_offload(resident_bytes, denoiser_leaves=leaves, prefetch=prefetch, device="cpu:0")
    for _ in range(2):
        assert torch.equal(tiny.picture(pipe, steps=3), stock)
    if resident_bytes == EVERYTHING:
        assert residency_of(pipe).layers.streamed == []
    pipe.disable_offload()
    assert differences(before, state_of(pipe)) == []
    assert torch.equal(tiny.picture(pipe, steps=3), stock)


def test_an_upcast_vae_of_sdxl():
    pipe = turbo(tiny.sdxl())
    pipe.enable_half_precision("float16")
    stock, before = tiny.picture(pipe), state_of(pipe)
    pipe.enable_partial_offload(200_000, device="cpu:0")
    assert torch.equal(tiny.picture(pipe), stock)
    pipe.disable_offload()
    assert differences(before, state_of(pipe)) == []


@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("resident_bytes", SIZES)
@pytest.mark.parametrize("make", [tiny.sd, tiny.sdxl, tiny.pixart], ids=["sd", "sdxl", "pixart"])
def test_no_more_on_the_device_than_was_asked_for(make, resident_bytes, prefetch, device):
    pipe = turbo(make())
    denoiser = "unet" if hasattr(pipe, "unet") else "transformer"
    pipe.enable_partial_offload(resident_bytes, prefetch=prefetch, device="cpu:0")
    device.watch(pipe)
    tiny.picture(pipe, steps=3)
    residency = residency_of(pipe)
    sizes = [group.size for group in residency.layers.groups]
    streamed = [index for index, group in enumerate(residency.layers.groups) if group in residency.layers.streamed]
    fixed = sum(tensor.nbytes for tensor in residency.layers.fixed)
    window, count = sum(window_sizes(sizes, streamed, 2 if prefetch else 1)), 2 if prefetch else 1
    assert device.peaks["window"] == window <= count * max(unit.size for unit in residency.layers.units)
    largest = max(sum(tensor.nbytes for tensor in unit.tensors) for unit in residency.layers.units)
    # the first forward has one layer at a time there, beside what belongs to no layer
    assert device.peaks[denoiser] <= max(resident_bytes, fixed + largest)
    total = sum(sizes)
    if resident_bytes < total:
        # what stays is all that fits: a group more would be too much
        stays = total - sum(group.size for group in residency.layers.streamed)
        assert stays + min(group.size for group in residency.layers.streamed) > resident_bytes - 2 * fixed - 512


def test_components_come_to_work_and_leave(device):
    pipe = turbo(tiny.sdxl())
    pipe.enable_partial_offload(700_000, denoiser_leaves=True, device="cpu:0")
    tiny.picture(pipe)
    seen: dict[str, set[str]] = {}
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}

    def look(name):
        def hook(*_):
            seen.setdefault(name, set()).update(other for other, part in parts.items() if device.bytes_of(part))

        return hook

    for name, part in parts.items():
        for module in part.modules():
            if module is not part:  # a component comes after these hooks of its own
                module.register_forward_pre_hook(look(name))
    tiny.picture(pipe)
    working = {name: others - {name} for name, others in seen.items() if name != "unet"}
    assert set(working) == {"text_encoder", "text_encoder_2", "vae"}
    assert set().union(*working.values()) == set(), "two components were there at once"
    assert seen["unet"] == {"unet"}
    assert not any(device.bytes_of(part) for part in parts.values()), "something stayed after the call"
    assert device.windows == []


def test_the_denoiser_stays_between_calls_unless_it_is_told_to_leave(device):
    pipe = turbo(tiny.sd())
    pipe.enable_partial_offload(700_000, device="cpu:0")
    tiny.picture(pipe)
    assert 0 < device.bytes_of(pipe.unet) <= 700_000
    assert device.bytes_of(pipe.vae) == device.bytes_of(pipe.text_encoder) == 0
    assert device.windows == []


def test_every_group_is_fetched_before_it_is_entered(monkeypatch):
    """A group that enters without having been fetched makes the device wait for its copy."""
    late = []
    entering = Window.enter

    def enter(self, group):
        if not any(slot.group is group for slot in self._slots):
            late.append(group)
        entering(self, group)

    monkeypatch.setattr(Window, "enter", enter)
    pipe = turbo(tiny.sd())
    pipe.enable_partial_offload(700_000, device="cpu:0")
    tiny.picture(pipe, steps=4)
    assert len(residency_of(pipe).layers.streamed) > 3
    assert late == []


def test_layers_that_stay_carry_no_hooks():
    pipe = turbo(tiny.sd())
    pipe.enable_partial_offload(700_000, device="cpu:0")
    tiny.picture(pipe)
    residency = residency_of(pipe)
    streamed = {unit.module for group in residency.layers.streamed for unit in group.units}
    hooked = {module for module in pipe.unet.modules() if "_hf_hook" in vars(module)}
    assert hooked == streamed | {pipe.unet}


def _pinning(monkeypatch, refuse=False):
    asked = []

    def lock(slab, device):
        if refuse:
            raise RuntimeError("CUDA error: out of memory")
        asked.append(len(slab))

    monkeypatch.setattr(page_locked, "can_pin", lambda device: True)
    monkeypatch.setattr(page_locked.Slab, "lock", lock)
    return asked


@pytest.mark.parametrize("budget", [0, 300_000, None])
def test_page_locked_memory_keeps_to_its_budget(budget, monkeypatch):
    asked = _pinning(monkeypatch)
    pipe = turbo(tiny.sd())
    stock = tiny.picture(pipe)
    pipe.enable_partial_offload(100_000, pinned_bytes=budget, device="cpu:0")
    for _ in range(2):
        assert torch.equal(tiny.picture(pipe), stock)
    residency = residency_of(pipe)
    streamed = sum(group.size for group in residency.layers.streamed)
    assert sum(asked) == residency.pinned.size
    if budget is None:
        others = [tensor for module in residency.others.values() for tensor in weights_of(module)]
        assert sum(asked) == streamed + sum(aligned(extent(tensor)) for tensor in others)
        assert "page-locked" in str(pipe.turbo_report())
    else:
        assert budget // 2 <= sum(asked) <= budget
        assert "holds no more" in str(pipe.turbo_report())


def test_page_locked_memory_goes_with_the_weights_that_lie_in_it(monkeypatch):
    gc.collect()  # what other tests have left
    locked, unlocked = [], []
    _pinning(monkeypatch)
    monkeypatch.setattr(page_locked.Slab, "lock", lambda slab, device: locked.append(len(slab)))
    monkeypatch.setattr(page_locked.Slab, "__del__", lambda slab: unlocked.append(len(slab)))
    pipe = turbo(tiny.sd())
    stock = tiny.picture(pipe)
    pipe.enable_partial_offload(100_000, device="cpu:0")
    assert torch.equal(tiny.picture(pipe), stock)
    gc.collect()
    assert residency_of(pipe).pinned.size == sum(locked)
    assert not unlocked
    pipe.disable_offload()
    for module in (pipe.unet, pipe.vae, pipe.text_encoder):
        for tensor in weights_of(module):
            tensor.data = tensor.data.clone()  # as weights are taken away from page-locked memory on a GPU
    gc.collect()
    assert unlocked == locked
    assert torch.equal(tiny.picture(pipe), stock)


def test_what_is_page_locked_already_counts_once(monkeypatch):
    """By default half of what was free at first: what is taken of it is no longer free."""
    asked = _pinning(monkeypatch)
    monkeypatch.setattr(page_locked, "host_memory", lambda: (0, 32 * MIB - sum(asked)))
    pinned = PinnedMemory(torch.device("cpu"), PartialOffload())
    first, second, third = (torch.zeros(size * MIB, dtype=torch.uint8) for size in (10, 5, 2))
    pinned.take_all([first])
    pinned.take([second], [])
    assert (pinned.size, pinned.trouble) == (15 * MIB, "")
    pinned.take([third], [])
    assert pinned.size == 15 * MIB
    assert "holds no more" in pinned.trouble


def test_refused_page_locked_memory_is_told(monkeypatch):
    _pinning(monkeypatch, refuse=True)
    pipe = turbo(tiny.sd())
    stock = tiny.picture(pipe)
    pipe.enable_partial_offload(100_000, device="cpu:0")
    assert torch.equal(tiny.picture(pipe), stock)
    assert "0 MiB are page-locked: the system refused: CUDA error: out of memory" in str(pipe.turbo_report())


@pytest.mark.skipif(torch.accelerator.is_available(), reason="only without an accelerator")
def test_without_an_accelerator_it_is_refused():
    pipe = turbo(tiny.sd())
    before = state_of(pipe)
    with pytest.raises(TurboError, match=r"enable_partial_offload\(\).*no accelerator on this machine"):
        pipe.enable_partial_offload(0)
    assert differences(before, state_of(pipe)) == []


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"resident_bytes": -1}, 'resident_bytes = -1; needed: bytes from 0 on, or text such as "6GB"'),
        ({"resident_bytes": 1.5}, "resident_bytes = 1.5"),
        ({"resident_bytes": "much"}, "resident_bytes"),
        ({"pinned_bytes": 5, "pin_memory": False}, "needed: pin_memory=True"),
        ({"denoiser_leaves": 1}, "denoiser_leaves = 1"),
    ],
)
def test_arguments_are_checked(arguments, text):
    with pytest.raises(TurboError, match=text):
        turbo(tiny.sd()).enable_partial_offload(**arguments, device="cpu")


OTHERS = {"sd": ("text_encoder", "vae"), "sdxl": ("text_encoder", "text_encoder_2", "vae")}


@pytest.mark.parametrize("make", [tiny.sd, tiny.sdxl], ids=["sd", "sdxl"])
def test_components_that_come_layer_by_layer(make, device, monkeypatch):
    """No more of them is there than the largest layer, and what is small or belongs to no layer."""
    monkeypatch.setattr(layers, "SMALL_BYTES", 1024)
    pipe = turbo(make())
    names = OTHERS[make.__name__]
    stock, before = tiny.picture(pipe, steps=3), state_of(pipe)
    pipe.enable_partial_offload(0, by_layers=names, device="cpu:0")
    for _ in range(2):
        assert torch.equal(tiny.picture(pipe, steps=3), stock)
    assert f"{', '.join(names)} layer by layer" in str(pipe.turbo_report())
    enter = PartialResidency.enter
    monkeypatch.setattr(PartialResidency, "enter", lambda self, unit: (enter(self, unit), device.look(pipe)))
    assert torch.equal(tiny.picture(pipe, steps=3), stock)
    for name in names:
        units, fixed = units_of({name: getattr(pipe, name)})
        largest = max(sum(tensor.nbytes for tensor in unit.tensors) for unit in units)
        small = sum(tensor.nbytes for unit in units if unit.size <= 1024 for tensor in unit.tensors)
        whole = sum(parameter.nbytes for parameter in getattr(pipe, name).parameters())
        assert 0 < device.peaks[name] <= largest + small + sum(tensor.nbytes for tensor in fixed) < whole
    pipe.disable_offload()
    assert differences(before, state_of(pipe)) == []
    assert torch.equal(tiny.picture(pipe, steps=3), stock)


@pytest.mark.parametrize("first", ["tiles", "offload"])
@pytest.mark.parametrize("make", [tiny.sd, tiny.sdxl], ids=["sd", "sdxl"])
def test_tiles_share_their_statistics_where_the_vae_comes_layer_by_layer(make, first):
    pipe = turbo(make())
    untiled = tiny.picture(pipe)
    pipe.enable_vae_tiling(tile_size=32)
    tiled = tiny.picture(pipe)
    assert not torch.equal(tiled, untiled)
    pipe.disable_vae_tiling()
    steps = [
        lambda: pipe.enable_vae_tiling(tile_size=32),
        lambda: pipe.enable_partial_offload(0, by_layers=OTHERS[make.__name__], denoiser_leaves=True, device="cpu:0"),
    ]
    for step in steps if first == "tiles" else reversed(steps):
        step()
    for _ in range(2):
        assert torch.equal(tiny.picture(pipe), tiled)
    assert any("_hf_hook" in vars(module) for module in pipe.vae.decoder.modules())
    pipe.turbo_undo()
    assert torch.equal(tiny.picture(pipe), untiled)


def test_layers_of_other_components_are_hooked_anew_where_weights_come_and_go(device, monkeypatch):
    monkeypatch.setattr(layers, "SMALL_BYTES", 0)
    pipe, plain = turbo(tiny.sd()), tiny.sd()
    pipe.enable_partial_offload(300_000, by_layers="text_encoder", device="cpu:0")
    stock = tiny.picture(pipe)
    for each in (pipe, plain):
        torch.manual_seed(1)
        # not by transformers' own method, whose 5.24 asks for a peft that is not released yet
        config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        inject_adapter_in_model(config, each.text_encoder)
    assert torch.equal(tiny.picture(pipe), tiny.picture(plain))
    lora = [part for name, part in pipe.text_encoder.named_modules() if name.endswith("lora_A.default")]
    assert lora
    assert all("_hf_hook" in vars(part) for part in lora)
    delete_adapter(pipe.text_encoder, "default", prefix="lora_")
    assert torch.equal(tiny.picture(pipe), stock)


def test_a_vae_that_is_cast_comes_by_layers_too():
    pipe = turbo(tiny.sdxl())
    pipe.enable_half_precision("float16")
    stock, before = tiny.picture(pipe), state_of(pipe)
    pipe.enable_partial_offload(200_000, by_layers=("vae", "text_encoder_2"), device="cpu:0")
    for _ in range(2):
        assert torch.equal(tiny.picture(pipe), stock)
    pipe.disable_offload()
    assert differences(before, state_of(pipe)) == []


def test_names_of_components_that_are_not_there():
    pipe = turbo(tiny.sd())
    with pytest.raises(TurboError, match=r"found by_layers=unet; needed: names among vae, text_encoder"):
        pipe.enable_partial_offload(0, by_layers=("vae", "unet"), device="cpu:0")
    with pytest.raises(TurboError, match="names of components"):
        pipe.enable_partial_offload(0, by_layers=(3,), device="cpu:0")
    assert pipe.turbo_report().levers == ()
