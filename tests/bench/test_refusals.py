"""What no run could follow is one line for the user, and leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from diffusers_turbo.bench.job import Job
from diffusers_turbo.bench.results import Status
from diffusers_turbo.errors import InvalidOptionError
from tests import tiny
from tests.bench.runs import SDPA, STOCK, files_in, make_job, measure


def refusal(job: Job, folder: Path, **options: Any) -> str:
    """The one line that the user reads; whatever lies in the folder stays as it is."""
    before = files_in(folder)
    with pytest.raises(InvalidOptionError) as caught:
        measure(job, folder / "new" / "inner", **options)
    assert files_in(folder) == before
    text = str(caught.value)
    assert "\n" not in text
    assert "What to do: " in text
    return text


def test_a_model_that_is_not_there(model, tmp_path, monkeypatch):
    def offline(*args: Any, **kwargs: Any) -> Any:
        raise OSError("no connection,\nno cache")

    text = refusal(make_job(str(tmp_path / "none")), tmp_path)
    assert f"loading {tmp_path / 'none'}: found no such folder; needed: a folder that save_pretrained() wrote" in text
    (tmp_path / "empty").mkdir()
    assert "found a folder without model_index.json" in refusal(make_job(str(tmp_path / "empty")), tmp_path)
    assert "no such folder" in refusal(make_job("plain-name"), tmp_path)
    monkeypatch.chdir(tmp_path)
    assert "no such folder" in refusal(make_job("empty/inner"), tmp_path)
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", offline)
    text = refusal(make_job("someone/something"), tmp_path)
    assert "loading someone/something: found OSError: no connection, no cache; needed: " in text
    assert "correct the path or the id" in text
    assert "sd15" in refusal(make_job("arch:sd155"), tmp_path)


def test_a_size_that_the_model_cannot_make(model, tmp_path):
    text = refusal(make_job(model, height=60, width=100), tmp_path)
    assert "the size: found 100x60; needed: multiples of 8 for StableDiffusionPipeline" in text
    assert "try --size 96x64" in text


@pytest.mark.parametrize(
    ("device", "count", "text"),
    [
        ("cuda", 0, "using cuda: found no cuda device that torch .* can use; needed: one.*such as"),
        ("cuda:2", 2, "using cuda:2: found 2 of them, counted from cuda:0.*choose a lower number"),
        ("gpu", 0, 'using gpu: found no device \'gpu\'; needed: "cpu", "cuda"'),
    ],
)
def test_a_device_that_is_not_there(model, tmp_path, monkeypatch, device, count, text):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(InvalidOptionError, match=text):
        measure(make_job(model, device=device), tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_a_task_that_is_not_there_for_the_model_is_a_result(tmp_path):
    tiny.pixart().save_pretrained(tmp_path / "model")
    (row,) = measure(make_job(str(tmp_path / "model"), task="inpaint"), tmp_path).rows
    assert row.status is Status.UNSUPPORTED
    assert "no inpaint pipeline for PixArtAlphaPipeline" in row.reason


def test_a_baseline_that_is_no_case(model, tmp_path, log):
    assert "found no case 'naive' in this run; needed: one of stock" in refusal(
        make_job(model), tmp_path, baseline="naive"
    )
    job = make_job(model, STOCK, SDPA, rounds=1)
    measure(job, tmp_path)
    assert measure(job, tmp_path, baseline="sdpa").baseline == "sdpa"
    before = files_in(tmp_path)
    with pytest.raises(InvalidOptionError, match="no case 'naive'"):
        measure(job, tmp_path, baseline="naive")
    assert files_in(tmp_path) == before
    assert measure(job, tmp_path).baseline == "sdpa"


def test_results_of_another_job_or_machine_are_left_alone(model, tmp_path, log):
    job = make_job(model, rounds=1)
    measure(job, tmp_path)
    before, path = files_in(tmp_path), tmp_path / "results.json"
    log.calls.clear()
    with pytest.raises(InvalidOptionError, match="steps: 1 in the results, 2 asked for now.*choose another --out"):
        measure(make_job(model, rounds=1, steps=2), tmp_path)
    with pytest.raises(InvalidOptionError, match="cases: stock in the results, sdpa asked for now"):
        measure(make_job(model, SDPA, rounds=1), tmp_path)
    assert files_in(tmp_path) == before
    data = json.loads(path.read_text())
    data["environment"]["versions"]["torch"] = "1.0"
    path.write_text(json.dumps(data))
    before = files_in(tmp_path)
    with pytest.raises(InvalidOptionError, match="torch: '1.0' in the results"):
        measure(job, tmp_path)
    assert files_in(tmp_path) == before
    assert log.calls == []


def test_a_half_written_file_is_left_alone(model, tmp_path, log):
    (tmp_path / "results.json").write_text('{"format_version": 1, "job": {"mod')
    before = files_in(tmp_path)
    with pytest.raises(InvalidOptionError, match="results.json: found JSONDecodeError.*move it away or choose another"):
        measure(make_job(model), tmp_path)
    assert files_in(tmp_path) == before
    assert log.calls == []


def test_a_folder_that_cannot_be_written_to_is_known_before_anything_is_loaded(model, tmp_path, log):
    (tmp_path / "file").write_text("")
    before = files_in(tmp_path)
    with pytest.raises(InvalidOptionError, match="writing the results to .*correct the folder's rights"):
        measure(make_job(model), tmp_path / "file" / "inner")
    assert files_in(tmp_path) == before
    assert log.calls == []
