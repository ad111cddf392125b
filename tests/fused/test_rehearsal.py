"""Variants of kernels, launched ahead of the first picture: each once, side by side, and never in the way."""

from __future__ import annotations

import dataclasses
import threading
from collections import Counter

import pytest
import torch

from diffusers_turbo.actions import fused_kernels
from diffusers_turbo.bench.architectures import build
from diffusers_turbo.fused.layers import FusedForward
from diffusers_turbo.fused.rehearsal import Rehearsal, rehearse
from diffusers_turbo.kernels.registry import KERNELS
from tests import tiny


def test_one_launch_a_variant_side_by_side_and_without_gradients():
    met = threading.Barrier(2, timeout=30)
    seen = []

    def launch(name):
        met.wait()  # two of them at a time, or never
        seen.append((name, torch.is_grad_enabled()))

    pairs = [Rehearsal(key, lambda key=key: launch(key)) for key in ("a", "b", "a", "b", "b")]
    assert rehearse(pairs, threads=2) == (2, [])
    assert sorted(seen) == [("a", False), ("b", False)]
    assert rehearse([]) == (0, [])


def test_what_fails_is_told_and_the_others_go_on():
    def fail():
        raise RuntimeError("ptxas is missing")

    count, failed = rehearse([Rehearsal("a", fail), Rehearsal("b", lambda: None)])
    assert (count, [str(error) for error in failed]) == (1, ["ptxas is missing"])


def layers(pipe, place) -> list[FusedForward]:
    places = {name: frozenset({place}) for name in KERNELS}
    found = []
    for component in ("unet", "vae"):
        for name, module in getattr(pipe, component).named_modules(prefix=component):
            for group in fused_kernels._stand_ins(module, name, places, Counter()):
                found += [forward for _, forward in group if isinstance(forward, FusedForward)]
    return found


@pytest.mark.parametrize(("name", "widths"), [("sd15", {320, 640, 1280}), ("sdxl", {640, 1280})])
def test_a_full_size_pipeline_has_three_dozen_variants(name, widths):
    pipe = build(name, dtype=torch.float16, device="meta", text_encoders=False)
    place = ("meta", torch.float16)
    keys = {one.key[0:1] + one.key[3:] for layer in layers(pipe, place) for one in layer.rehearsals()}
    assert {key[1] for key in keys if key[0] == "add_layer_norm"} == widths
    # channels a group, 320 to 2560 channels in 32 groups, in three sizes that are held and one that is not
    assert {key[2] for key in keys if key[1] == "single"} == {10, 20, 30, 40, 60, 80}
    assert [sum(key[1] == way for key in keys) for way in ("single", "split")] == [24, 1]
    # both ways to cut a projection, whose depth is the transformer's width
    assert {key[1] for key in keys if key[0] == "linear_geglu"} == widths
    assert sum(key[0] == "upsample_conv" for key in keys) == 1
    assert len(keys) == 28 + 3 * len(widths)


def test_every_rehearsal_is_a_launch_that_the_kernel_takes(kernel_calls, monkeypatch):
    pipe = tiny.sd()
    asked = []
    for name, kernel in KERNELS.items():

        def run(*arguments, kernel=kernel, name=name, **options):
            asked.append(name)
            with torch.no_grad():
                assert kernel.misfits(*arguments, **options) == []

        monkeypatch.setitem(KERNELS, name, dataclasses.replace(kernel, run=run))
    rehearsals = [one for layer in layers(pipe, ("cpu", torch.float32)) for one in layer.rehearsals()]
    count, failed = rehearse(rehearsals)
    assert failed == []
    assert set(asked) == set(KERNELS)
    assert count == len(asked) == len({one.key for one in rehearsals})


def test_off_the_gpu_nothing_is_rehearsed():
    pipe = tiny.sd()
    assert not [one for layer in layers(pipe, ("cuda", torch.float16)) for one in layer.rehearsals()]
    assert fused_kernels._compile_ahead(layers(pipe, ("cpu", torch.float32))) is None or torch.cuda.is_available()
