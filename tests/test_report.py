"""The report: what is on, its options, exact or lossy and why, what lies below, the plan; as text and as JSON."""

from __future__ import annotations

import json

from diffusers_turbo import auto_optimize, turbo
from tests import tiny


def test_nothing_on():
    report = turbo(tiny.sd()).turbo_report()
    assert str(report) == "StableDiffusionPipeline: nothing switched on"
    assert report.exact


def test_levers_in_words_and_as_data():
    pipe = turbo(tiny.sd())
    pipe.enable_naive_attention()
    pipe.enable_sdpa(backend="math")
    pipe.enable_vae_tiling(tile_size=32)
    report = pipe.turbo_report()
    text = str(report)
    assert "2 in force, LOSSY" in text
    assert "enable_naive_attention() (covered by the one after it)" in text
    assert "enable_sdpa(backend='math')  [exact]" in text
    assert "enable_vae_tiling(tile_size=32)  [LOSSY: a tile's attention and convolutions see only the tile" in text
    assert "set on 8 layers of unet, 2 layers of vae" in text or "set on 2 layers of vae, 8 layers of unet" in text
    data = json.loads(report.to_json())
    assert data["exact"] is False
    assert [lever["action"] for lever in data["levers"]] == [
        "enable_naive_attention",
        "enable_sdpa",
        "enable_vae_tiling",
    ]
    assert data["levers"][2]["options"] == {"tile_size": 32, "overlap": None}
    pipe.disable_vae_tiling()
    assert pipe.turbo_report().exact


def test_the_plan_is_part_of_it_until_undone():
    pipe = auto_optimize(tiny.sd())
    report = pipe.turbo_report()
    assert {step.action for step in report.plan.steps} == {lever.action for lever in report.levers}
    assert report.plan.explain() in str(report)
    assert json.loads(report.to_json())["plan"]["rejected"]
    assert pipe.turbo_undo().plan is None
    assert pipe.turbo_report().plan is None


def test_half_precision_says_what_it_keeps_in_host_memory():
    pipe = turbo(tiny.sd())
    weights = sum(p.nbytes for m in (pipe.unet, pipe.vae, pipe.text_encoder) for p in m.parameters())
    pipe.enable_half_precision("bfloat16")
    assert f"originals kept in host memory: {weights / 2**20:.0f} MiB" in str(pipe.turbo_report())
