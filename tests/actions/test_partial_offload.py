"""Partial offload: which weights stay, how much is on the device at a time, and that nothing is left behind."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from peft import LoraConfig
from torch import nn

from diffusers_turbo import TurboError, turbo
from diffusers_turbo.actions import page_locked, partial_offload
from diffusers_turbo.actions.ledger import ledger_of
from diffusers_turbo.actions.partial_offload import PartialResidency
from diffusers_turbo.actions.streaming import Window
from diffusers_turbo.planning.residents import window_bytes
from tests import tiny
from tests.state import differences, state_of

EVERYTHING = 10**9
SIZES = (0, 100_000, 700_000, 1_500_000, EVERYTHING)


def residency_of(pipe) -> PartialResidency:
    journal = ledger_of(pipe).top("offload").journal
    return next(change for change in journal.changes if isinstance(change, PartialResidency))


class Device:
    """Stands in for a GPU: the CPU, with a book of what was moved to it, kept where weights are moved."""

    def __init__(self, monkeypatch):
        self.held: dict[int, int] = {}
        self.windows: list[Window] = []
        self.peaks: dict[str, int] = {}
        device = self

        def bring(tensors, where):
            for tensor in tensors:
                tensor.data = tensor.data.clone()
                device.held.pop(id(tensor), None)
                if where != partial_offload.HOST:
                    device.held[id(tensor)] = tensor.data_ptr()

        class Counted(Window):
            def __init__(self, where, size, count):
                super().__init__(where, size, count)
                self.bytes = size * count
                device.windows.append(self)

            def close(self):
                device.windows.remove(self)
                super().close()

        monkeypatch.setattr(partial_offload, "bring", bring)
        monkeypatch.setattr(partial_offload, "Window", Counted)

    def bytes_of(self, module: nn.Module) -> int:
        """Bytes of a component on the device; the window's belong to nobody."""
        tensors = [*module.parameters(), *module.buffers()]
        passing = [(slot.buffer.data_ptr(), slot.buffer.nbytes) for window in self.windows for slot in window._slots]
        here = [tensor for tensor in tensors if self.held.get(id(tensor)) == tensor.data_ptr()]
        return sum(
            tensor.nbytes
            for tensor in here
            if not any(start <= tensor.data_ptr() < start + size for start, size in passing)
        )

    def look(self, pipe) -> None:
        window = sum(window.bytes for window in self.windows)
        for name, part in pipe.components.items():
            if isinstance(part, nn.Module):
                self.peaks[name] = max(self.peaks.get(name, 0), self.bytes_of(part))
        self.peaks["window"] = max(self.peaks.get("window", 0), window)

    def watch(self, pipe) -> None:
        """Look at the start of every layer of every component."""
        for part in pipe.components.values():
            if isinstance(part, nn.Module):
                for module in part.modules():
                    if not list(module.children()):
                        module.register_forward_pre_hook(lambda *_: self.look(pipe))


@pytest.fixture
def device(monkeypatch):
    return Device(monkeypatch)


@pytest.mark.parametrize("leaves", [False, True])
@pytest.mark.parametrize("resident_bytes", SIZES)
@pytest.mark.parametrize("make", [tiny.sd, tiny.sdxl, tiny.pixart], ids=["sd", "sdxl", "pixart"])
def test_pictures_to_the_bit_and_undo(make, resident_bytes, leaves):
    pipe = turbo(make())
    stock, before = tiny.picture(pipe, steps=3), state_of(pipe)
    # "cpu:0" is not "cpu": weights that stay are copies, as on a GPU
    pipe.enable_partial_offload(resident_bytes, denoiser_leaves=leaves, device="cpu:0")
    for _ in range(2):
        assert torch.equal(tiny.picture(pipe, steps=3), stock)
    if resident_bytes == EVERYTHING:
        assert residency_of(pipe).streamed == []
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


@pytest.mark.parametrize("resident_bytes", SIZES)
@pytest.mark.parametrize("make", [tiny.sd, tiny.sdxl, tiny.pixart], ids=["sd", "sdxl", "pixart"])
def test_no_more_on_the_device_than_was_asked_for(make, resident_bytes, device):
    pipe = turbo(make())
    denoiser = "unet" if hasattr(pipe, "unet") else "transformer"
    pipe.enable_partial_offload(resident_bytes, device="cpu:0")
    device.watch(pipe)
    tiny.picture(pipe, steps=3)
    residency = residency_of(pipe)
    sizes = [group.size for group in residency.groups]
    streamed = [index for index, group in enumerate(residency.groups) if group in residency.streamed]
    fixed = sum(tensor.nbytes for tensor in residency.fixed)
    assert device.peaks["window"] == window_bytes(sizes, streamed) <= 2 * max(unit.size for unit in residency.units)
    largest = max(sum(tensor.nbytes for tensor in unit.tensors) for unit in residency.units)
    # the first forward has one layer at a time there, beside what belongs to no layer
    assert device.peaks[denoiser] <= max(resident_bytes, fixed + largest)
    total = sum(sizes)
    if resident_bytes < total:
        # what stays is all that fits: a group more would be too much
        stays = total - sum(group.size for group in residency.streamed)
        assert stays + min(group.size for group in residency.streamed) > resident_bytes - 2 * fixed - 512


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
    assert len(residency_of(pipe).streamed) > 3
    assert late == []


def test_layers_that_stay_carry_no_hooks():
    pipe = turbo(tiny.sd())
    pipe.enable_partial_offload(700_000, device="cpu:0")
    tiny.picture(pipe)
    residency = residency_of(pipe)
    streamed = {unit.module for group in residency.streamed for unit in group.units}
    hooked = {module for module in pipe.unet.modules() if "_hf_hook" in vars(module)}
    assert hooked == streamed | {pipe.unet}


def test_weights_changed_in_place_while_it_is_on():
    """By way of the parameter, between calls and between steps: both where they stay and where they are streamed."""
    pipe, plain = turbo(tiny.sd()), tiny.sd()
    pipe.enable_partial_offload(700_000, device="cpu:0")
    tiny.picture(pipe)

    def change(pipe):
        with torch.no_grad():
            for parameter in pipe.unet.parameters():
                parameter.mul_(1.01)

    def in_the_middle(pipe, step, timestep, tensors):
        if step == 1:
            change(pipe)
        return {}

    for each in (pipe, plain):
        change(each)
    assert torch.equal(tiny.picture(pipe), tiny.picture(plain))
    ours, stock = (tiny.picture(each, steps=4, callback_on_step_end=in_the_middle) for each in (pipe, plain))
    assert torch.equal(ours, stock)
    pipe.disable_offload()
    assert torch.equal(tiny.picture(pipe), tiny.picture(plain))


@pytest.mark.parametrize("resident_bytes", [0, 700_000, EVERYTHING])
def test_a_lora_that_comes_and_goes(resident_bytes, device):
    pipe, plain = turbo(tiny.sd()), tiny.sd()
    pipe.enable_partial_offload(resident_bytes, device="cpu:0")
    stock = tiny.picture(pipe)
    for each in (pipe, plain):
        torch.manual_seed(1)
        config = LoraConfig(r=2, target_modules=["to_q", "conv1"], init_lora_weights=False)
        each.unet.add_adapter(config)
    expected = tiny.picture(plain)
    assert not torch.equal(expected, stock)
    assert torch.equal(tiny.picture(pipe), expected)
    modules = {unit.module for unit in residency_of(pipe).units}
    assert {part for name, part in pipe.unet.named_modules() if name.endswith("lora_A.default")} <= modules
    pipe.disable_offload()
    assert torch.equal(tiny.picture(pipe), expected)
    assert not any("_hf_hook" in vars(module) for module in pipe.unet.modules())
    pipe.enable_partial_offload(resident_bytes, device="cpu:0")
    pipe.unet.delete_adapters("default")
    assert torch.equal(tiny.picture(pipe), stock)


@pytest.mark.parametrize("steps_before", [0, 1])
def test_an_error_in_the_middle_of_a_forward(steps_before, device):
    pipe = turbo(tiny.sd())
    stock, before = tiny.picture(pipe, steps=3), state_of(pipe)
    pipe.enable_partial_offload(100_000, device="cpu:0")
    conv, calls = pipe.unet.mid_block.resnets[0].conv1, []
    works = conv._conv_forward

    def fail(*arguments):
        calls.append(arguments)
        if len(calls) == steps_before + 1:
            raise KeyboardInterrupt
        return works(*arguments)

    conv._conv_forward = fail
    with pytest.raises(KeyboardInterrupt):
        tiny.picture(pipe, steps=3)
    assert device.windows == []
    assert device.bytes_of(pipe.unet) <= 100_000 * steps_before
    assert torch.equal(tiny.picture(pipe, steps=3), stock)
    del conv._conv_forward
    pipe.disable_offload()
    assert differences(before, state_of(pipe)) == []


def test_the_denoiser_called_outside_of_the_pipeline():
    pipe = turbo(tiny.sd())
    arguments = (torch.ones(1, 4, 8, 8), 3, torch.ones(1, tiny.TOKENS, tiny.CONTEXT))
    with torch.no_grad():
        stock = pipe.unet(*arguments).sample
        pipe.enable_partial_offload(700_000, device="cpu:0")
        for _ in range(3):
            assert torch.equal(pipe.unet(*arguments).sample, stock)
    with torch.inference_mode():
        assert torch.equal(pipe.unet(*arguments).sample, stock)
    pipe.disable_offload()
    assert not any(parameter.is_inference() for parameter in pipe.unet.parameters())


def test_a_layer_that_works_twice_in_a_forward():
    pipe = turbo(tiny.sd())
    twice = nn.Sequential(nn.Linear(32, 32), nn.SiLU())
    twice.append(twice[0])
    pipe.unet.conv_act = nn.Sequential(_LastDimension(twice), nn.SiLU())
    stock = tiny.picture(pipe, steps=3)
    pipe.enable_partial_offload(0, device="cpu:0")
    assert torch.equal(tiny.picture(pipe, steps=3), stock)
    assert torch.equal(tiny.picture(pipe, steps=3), stock)


class _LastDimension(nn.Module):
    """Applies layers of the last dimension to `[B, C, H, W]`."""

    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, x):
        return self.layers(x.movedim(1, -1)).movedim(-1, 1)


def test_a_controlnet_shares_the_room_with_the_denoiser(device):
    base = tiny.sd()
    controlnet = ControlNetModel.from_unet(base.unet, conditioning_embedding_out_channels=(8, 8, 16, 16)).eval()
    parts = {name: part for name, part in base.components.items() if name != "safety_checker"}
    pipe = turbo(
        StableDiffusionControlNetPipeline(
            **parts, controlnet=controlnet, safety_checker=None, requires_safety_checker=False
        )
    )
    pipe.set_progress_bar_config(disable=True)
    arguments = {"image": torch.ones(1, 3, 64, 64), "height": 64, "width": 64}
    # it has no part in the first of four steps
    arguments |= {"control_guidance_start": 0.3, "steps": 4}
    stock = tiny.picture(pipe, **arguments)
    pipe.enable_partial_offload(500_000, device="cpu:0")
    device.watch(pipe)
    for _ in range(2):
        assert torch.equal(tiny.picture(pipe, **arguments), stock)
    residency = residency_of(pipe)
    assert list(residency.looped) == ["controlnet", "unet"]
    assert len({unit for group in residency.groups for unit in group.units}) == len(residency.units)
    device.peaks.clear()
    assert torch.equal(tiny.picture(pipe, **arguments), stock)
    assert device.peaks["unet"] + device.peaks["controlnet"] <= 500_000


def test_it_takes_its_turn_with_the_other_offloads():
    pipe = turbo(tiny.sd())
    stock, before = tiny.picture(pipe), state_of(pipe)
    pipe.enable_partial_offload(700_000, device="cpu:0")
    tiny.picture(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(tiny.picture(pipe), stock)
    pipe.enable_partial_offload(0, device="cpu:0")
    pipe.enable_channels_last()
    tiny.picture(pipe)
    assert [lever.in_force for lever in pipe.turbo_report().levers if lever.slot == "offload"] == [False, True]
    pipe.turbo_undo()
    assert differences(before, state_of(pipe)) == []


def test_a_copy_streams_its_own_weights():
    pipe = turbo(tiny.sd())
    stock = tiny.picture(pipe)
    pipe.enable_partial_offload(700_000, device="cpu:0")
    tiny.picture(pipe)
    twin = copy.deepcopy(pipe)
    with torch.no_grad():
        twin.unet.conv_out.weight.zero_()
    assert torch.equal(tiny.picture(pipe), stock)
    assert not torch.equal(tiny.picture(twin), stock)


def _pinning(monkeypatch, refuse=False):
    asked = []

    def allocate(size):
        if refuse:
            raise RuntimeError("CUDA error: out of memory")
        asked.append(size)
        return torch.empty(size, dtype=torch.uint8)

    monkeypatch.setattr(partial_offload, "can_pin", lambda device: True)
    monkeypatch.setattr(page_locked, "page_locked", allocate)
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
    streamed = sum(group.size for group in residency.streamed)
    assert sum(asked) == residency.pinned_bytes
    if budget is None:
        assert streamed <= sum(asked) < 2 * streamed
        assert "page-locked" in str(pipe.turbo_report())
    else:
        assert budget // 2 <= sum(asked) <= budget
        assert "holds no more" in str(pipe.turbo_report())


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
