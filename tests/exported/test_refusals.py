"""What is refused before any native code of a package runs, and what is not exported at all."""

from __future__ import annotations

import os

import pytest
import torch
from peft import LoraConfig

from diffusers_turbo import TurboError, turbo
from diffusers_turbo.actions import exporting
from diffusers_turbo.exported import package
from diffusers_turbo.exported.package import Package
from tests import tiny
from tests.exported.fake import change_card, write
from tests.state import differences, state_of


def symlink(path):
    os.rename(path, path.with_name("elsewhere.pt2"))
    path.symlink_to(path.with_name("elsewhere.pt2"))


def other_weights(card):
    card["unet"]["tensors"]["conv_in.weight"][0] = "float16"


def damage(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def on_a_card(card):
    card["machine"] |= {"device": "cuda", "sm": [8, 6]}


FILES = {
    "none": (lambda path: path.unlink(), "No such file"),
    "a link": (symlink, "is a symbolic link"),
    "the group's": (lambda path: path.chmod(0o660), "can be written to by its group"),
    "everybody's": (lambda path: path.chmod(0o606), "can be written to by everybody"),
    "everybody's folder": (lambda path: path.parent.chmod(0o777), "can be written to by its group and everybody"),
    "truncated": (lambda path: os.truncate(path, 2000), "truncated or no such file"),
    "damaged": (damage, "truncated or no such file"),
    "empty": (lambda path: os.truncate(path, 0), "truncated or no such file"),
    "no card": (lambda path: write(path, None), "truncated or no such file"),
    "another format": (lambda path: change_card(path, lambda card: card.update(format=99)), "format 99, this version"),
}
CARDS = {
    "another class": (lambda card: card["unet"].update(cls="UNetMotionModel"), "exported from a UNetMotionModel"),
    "another config": (lambda card: card["unet"].update(config="0"), "a UNet2DConditionModel of another config"),
    "another dtype": (other_weights, "another dtype of conv_in.weight"),
    "another torch": (lambda card: card["versions"].update(torch="2.0.0"), "exported with 2.0.0"),
    "another diffusers": (lambda card: card["versions"].update(diffusers="0.1"), "exported with 0.1"),
    "another device": (on_a_card, "a UNet on cpu, exported on cuda"),
    "another GPU": (lambda card: card["machine"].update(sm=[9, 0]), "exported for SM 9.0"),
    "another system": (lambda card: card["machine"].update(system="plan9 mips"), "exported on plan9 mips"),
    "another CPU": (lambda card: card["machine"].update(cpu_flags=["avx1024"]), "a CPU without avx1024"),
}


def refused(twins, monkeypatch, text):
    """Loading is refused with this text, runs nothing, and changes nothing."""
    monkeypatch.setattr(Package, "load", lambda self, device: pytest.fail("native code was loaded"))
    before = state_of(twins.ours)
    with pytest.raises(TurboError, match=text) as caught:
        twins.ours.load_exported_unet(twins.path)
    assert "load_exported_unet(" in str(caught.value) or "reading " in str(caught.value)
    assert "What to do: " in str(caught.value)
    assert differences(before, state_of(twins.ours)) == []


@pytest.mark.parametrize("change", FILES, ids=str)
def test_files_that_are_not_loaded(twins, monkeypatch, change):
    FILES[change][0](twins.path)
    refused(twins, monkeypatch, FILES[change][1])


@pytest.mark.parametrize("change", CARDS, ids=str)
def test_packages_for_something_else(twins, monkeypatch, change):
    change_card(twins.path, CARDS[change][0])
    refused(twins, monkeypatch, CARDS[change][1])


def test_another_users_file(twins, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    refused(twins, monkeypatch, "belongs to another user")


def test_a_unet_of_other_shapes(twins, monkeypatch):
    twins.ours.unet = tiny.unet(block_out_channels=(32, 32))
    refused(twins, monkeypatch, "another config.*another shape of .*")


def test_code_that_can_not_be_loaded(twins, monkeypatch):
    def fail(self, device):
        raise RuntimeError("undefined symbol")

    monkeypatch.setattr(Package, "load", fail)
    with pytest.raises(
        TurboError, match=r"found RuntimeError: undefined symbol; needed: code that this torch can load"
    ):
        twins.ours.load_exported_unet(twins.path)
    assert twins.ours.unet._compiled_call_impl is None


def test_code_that_crashes_when_loaded_is_not_written(twins, tmp_path, monkeypatch):
    """In a process of its own, so that this one lives to say so."""
    monkeypatch.setattr(exporting, "crash_when_loaded", package.crash_when_loaded)
    monkeypatch.setattr(package, "_LOADING", "import os; os.abort()")
    with pytest.raises(TurboError, match=r"crashes a process which loads it \(SIGABRT\).*name another, as in CXX="):
        twins.ours.export_unet(tmp_path / "other.pt2")
    assert [path.name for path in tmp_path.iterdir()] == ["unet.pt2"]


@pytest.mark.parametrize("path", ["unet.so", ""])
def test_names_that_are_none(twins, path):
    with pytest.raises(TurboError, match=r"needed: the path of a .pt2 file"):
        twins.ours.load_exported_unet(path)


EXPORTS = {
    "a LoRA": (
        lambda pipe: pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"])),
        "found adapters around . layers",
    ),
    "naive attention": (lambda pipe: pipe.enable_naive_attention(), "found attention processors NaiveAttnProcessor"),
    "a compiled UNet": (lambda pipe: pipe.compile_unet(backend="eager"), "that is compiled, exported or under graphs"),
    "offload": (lambda pipe: pipe.enable_model_cpu_offload(device="cpu"), "carries offload hooks"),
    "a quantised UNet": (lambda pipe: setattr(pipe.unet, "is_quantized", True), "found unet is quantised"),
    "a UNet of classes": (
        lambda pipe: setattr(pipe, "unet", tiny.unet(num_class_embeds=3)),
        "found a UNet with num_class_embeds=3",
    ),
}


@pytest.mark.parametrize("change", EXPORTS, ids=str)
def test_what_is_not_exported(twins, tmp_path, change):
    EXPORTS[change][0](twins.ours)
    with pytest.raises(TurboError, match=EXPORTS[change][1]):
        twins.ours.export_unet(tmp_path / "other.pt2")
    assert [path.name for path in tmp_path.iterdir()] == ["unet.pt2"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"path": "unet.so"}, "a name that ends in .pt2"),
        ({"path": "nowhere/unet.pt2"}, "a folder that is there"),
        ({"height": 100}, "height=100; needed: a positive multiple of 8"),
        ({"batch_size": 0}, "batch_size=0; needed: a positive integer"),
    ],
)
def test_requests_that_are_not_exported(twins, tmp_path, arguments, text):
    with pytest.raises(TurboError, match=text):
        twins.ours.export_unet(tmp_path / arguments.pop("path", "other.pt2"), **arguments)


def test_a_folder_that_others_can_write_to_is_refused_before_compiling(twins, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "export_program", lambda *args, **kwargs: pytest.fail("exported"))
    tmp_path.chmod(0o777)
    with pytest.raises(TurboError, match="can be written to by its group and everybody"):
        twins.ours.export_unet(tmp_path / "other.pt2")


def test_a_failure_of_the_compiler_leaves_nothing_behind(twins, tmp_path, monkeypatch):
    def fail(program, card, path):
        path.write_text("half of it")
        raise RuntimeError("g++ was not found")

    monkeypatch.setattr(exporting, "write_package", fail)
    before = state_of(twins.ours)
    with pytest.raises(TurboError, match=r"found RuntimeError: g\+\+ was not found"):
        twins.ours.export_unet(tmp_path / "other.pt2")
    assert [path.name for path in tmp_path.iterdir()] == ["unet.pt2"]
    assert differences(before, state_of(twins.ours)) == []


def test_the_file_is_for_its_owner_to_write_whatever_the_umask(tmp_path, monkeypatch):
    from diffusers_turbo.exported import package

    def compile_and_package(program, *, package_path, inductor_configs):
        assert inductor_configs.items() >= package.SETTINGS.items()
        write(tmp_path / "x.pt2", None)
        (tmp_path / "x.pt2").chmod(0o666)

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compile_and_package)
    card = type("Card", (), {"to_json": lambda self: "{}"})()
    package.write_package(None, card, tmp_path / "x.pt2")
    assert (tmp_path / "x.pt2").stat().st_mode & 0o777 == 0o644


def test_no_path_is_no_file():
    from diffusers_turbo.planning.options import LoadExportedUNet

    with pytest.raises(TurboError, match="found no path"):
        exporting.apply(turbo(tiny.sd()), LoadExportedUNet())
