"""Runs by turns on the tiny model: the order of calls, what is in a call, batches, tasks, distances."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL

from diffusers_turbo.actions.apply import APPLY
from diffusers_turbo.actions.undo import Journal
from diffusers_turbo.bench import loading
from diffusers_turbo.bench.cases import Case, builtin_cases
from diffusers_turbo.bench.results import Results, Status
from diffusers_turbo.planning import options as opt
from tests.bench.runs import CHANNELS_LAST, SDPA, STOCK, TILED, make_job, measure
from tests.test_exactness import EMOJI


def test_rounds_go_by_turns_and_warm_up_is_kept_apart(model, tmp_path, log, calls):
    found = measure(make_job(model, STOCK, SDPA, warmup=2), tmp_path)
    start = [
        (name, case, *batch) for case in ("stock", "sdpa") for name, *batch in (("load",), ("first", 1), ("round", 1))
    ]
    assert log.calls == start + [("round", "stock", 1), ("round", "sdpa", 1)] * 3
    assert len(calls.arguments) == 2 * (1 + 1 + 3)
    warm_stock, warm_sdpa, *rounds = log.seconds
    stock, sdpa = found.rows
    assert (stock.seconds, sdpa.seconds) == (rounds[::2], rounds[1::2])
    assert (stock.warmup_s, sdpa.warmup_s) == ([warm_stock], [warm_sdpa])
    for row in found.rows:
        assert row.status is Status.OK
        assert row.first_image_s > 0
        assert row.first_image_s not in row.seconds + row.warmup_s
        assert row.load_s > 0
        assert row.apply_s >= 0
        assert (row.distance, row.verdict) == (None, None)
    assert stock.report is None
    assert [lever["action"] for lever in sdpa.report["levers"]] == ["enable_sdpa"]
    assert found.started <= found.finished
    assert found.environment["matmul_tflops"] is None
    assert Results.load(tmp_path / "results.json") == found
    assert list(tmp_path.iterdir()) == [tmp_path / "results.json"]


def test_a_call_is_the_user_s_and_the_same_in_every_round(model, tmp_path, calls):
    job = make_job(model, prompt="a cat", seed=7, scheduler="euler", guidance_scale=3.0, height=48, width=64)
    measure(job, tmp_path)
    for arguments in calls.arguments:
        asked = {key: arguments[key] for key in ("prompt", "num_inference_steps", "guidance_scale", "height", "width")}
        assert asked == {
            "prompt": ["a cat"],
            "num_inference_steps": 1,
            "guidance_scale": 3.0,
            "height": 48,
            "width": 64,
        }
    assert set(calls.schedulers) == {"EulerDiscreteScheduler"}
    assert calls.images[0].shape == (1, 3, 48, 64)
    assert all(torch.equal(image, calls.images[0]) for image in calls.images)


def test_progress_counts_rounds_to_the_end_also_of_rows_that_fail(model, tmp_path):
    told = []
    cases = (STOCK, builtin_cases()["xformers"])
    job = make_job(model, *cases, rounds=2)
    measure(job, tmp_path, progress=lambda *what: told.append(what))
    done = [item[1] for item in told]
    assert {item[2] for item in told} == {4}
    assert done == sorted(done)
    assert [item[:2] for item in told[-3:]] == [
        ("stock, batch 1, round 1 of 2", 2),
        ("stock, batch 1, round 2 of 2", 3),
        ("measured", 4),
    ]
    assert "loading xformers" in {item[0] for item in told}


def test_batches(model, tmp_path, log, calls):
    found = measure(make_job(model, STOCK, SDPA, batches=(2, 1), rounds=2), tmp_path)
    assert [(row.case, row.batch) for row in found.rows] == [("stock", 2), ("sdpa", 2), ("stock", 1), ("sdpa", 1)]
    assert [call for call in log.calls if call[0] == "load"] == [("load", "stock"), ("load", "sdpa")]
    assert [call[1:] for call in log.calls if call[0] == "round"] == [
        (case, batch) for batch in (2, 1) for _ in range(2) for case in ("stock", "sdpa")
    ]
    assert [len(arguments["prompt"]) for arguments in calls.arguments] == [2] * 6 + [1] * 6
    assert all(len(row.seconds) == 2 and row.status is Status.OK for row in found.rows)


@pytest.mark.parametrize("task", ["img2img", "inpaint"])
def test_tasks(model, tmp_path, task):
    found = measure(make_job(model, SDPA, task=task, pairs=1, rounds=1, steps=2), tmp_path)
    (row,) = found.rows
    assert (row.status, row.reason) == (Status.OK, None)
    assert (row.verdict, row.verdict_reasons) == ("exact", [])


def test_without_the_decoder(model, tmp_path, calls, monkeypatch):
    def decode(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the decoder ran")

    monkeypatch.setattr(AutoencoderKL, "decode", decode)
    found = measure(make_job(model, decode=False, pairs=1), tmp_path)
    assert [row.status for row in found.rows] == [Status.OK]
    assert calls.images[0].shape == (1, 4, 8, 8)
    assert (found.rows[0].verdict, found.rows[0].verdict_reasons) == (None, [])


def test_plans_and_autocast_reach_the_calls(model, tmp_path, calls):
    cases = (Case(name="auto", auto={"exact": True}), Case(name="autocast", autocast="bfloat16"))
    found = measure(make_job(model, *cases, rounds=1), tmp_path)
    assert [row.status for row in found.rows] == [Status.OK] * 2
    assert found.rows[0].report["plan"]["steps"]
    assert calls.autocast == [False, True, False, True]


def test_a_plan_is_made_for_the_jobs_own_calls(model, tmp_path, monkeypatch):
    asked = []

    def auto_optimize(pipe: Any, **given: Any) -> Any:
        asked.append(given)
        return pipe

    monkeypatch.setattr(loading, "auto_optimize", auto_optimize)
    job = make_job(model, Case(name="auto", auto={}), Case(name="other", auto={"steps": 9}), rounds=1, steps=2)
    measure(job, tmp_path)
    given = {"device": "cpu", "height": None, "width": None, "batch_size": 1, "steps": 2}
    assert asked == [given, given | {"steps": 9}]


def mid_block_skipped(pipe: Any, options: Any) -> Journal:
    journal = Journal()
    journal.set_attribute(pipe.unet.mid_block, "forward", lambda hidden_states, *args, **kwargs: hidden_states)
    return journal


def test_what_is_sound_is_exact_and_what_rounds_is_measured_against_stock(model, tmp_path):
    cases = (STOCK, Case(name="autocast", autocast="bfloat16"))
    found = measure(make_job(model, *cases, rounds=1, pairs=2), tmp_path)
    stock, autocast = found.rows
    assert [(row.verdict, row.verdict_reasons) for row in found.rows] == [("exact", [])] * 2
    assert stock.distance["psnr_db"] >= 90
    assert stock.distance["stock"] is None
    for row in found.rows:
        assert (row.distance["pictures"], row.distance["steps"]) == (2, 1)
        assert row.distance["reference"] == "fp32, naive attention"
    assert (autocast.distance["dtype"], autocast.distance["psnr_db"] < 90) == ("bfloat16", True)
    # the case is stock under autocast itself
    assert autocast.distance["stock"]["rmse"] == autocast.distance["rmse"]
    assert Results.load(tmp_path / "results.json") == found


def test_what_is_lossy_is_close_and_a_fault_is_different(tmp_path, monkeypatch):
    monkeypatch.setitem(APPLY, opt.ChannelsLast, mid_block_skipped)
    found = measure(make_job(str(EMOJI), TILED, CHANNELS_LAST, steps=2, rounds=1, pairs=1), tmp_path)
    tiled, faulty = found.rows
    assert (tiled.verdict, faulty.verdict) == ("close", "different")
    assert 25 <= tiled.distance["psnr_db"] < 90
    assert tiled.verdict_reasons == [f"{tiled.distance['psnr_db']:.1f} dB from the reference, below 90 dB"]
    assert faulty.distance["psnr_db"] < 20
    assert any("below 25 dB" in reason for reason in faulty.verdict_reasons)


def test_a_comparison_that_fails_leaves_the_times(model, tmp_path, log):
    log.fail_at, log.error = 3, ValueError("no\ndistance")
    (row,) = measure(make_job(model, rounds=1, pairs=1), tmp_path).rows
    assert log.calls[3] == ("compare",)
    assert (row.status, len(row.seconds), row.verdict) == (Status.OK, 1, None)
    assert row.verdict_reasons == ["not compared: ValueError: no distance"]
