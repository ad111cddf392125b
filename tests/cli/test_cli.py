"""The command line on the emoji model: what each command prints, writes and returns; every refusal by its text."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from diffusers_turbo import Plan
from diffusers_turbo.__main__ import main
from diffusers_turbo.bench import rates
from diffusers_turbo.bench.suites import read_suite
from diffusers_turbo.cli.arguments import height_and_width, spread_lists
from tests.test_exactness import EMOJI

MODEL = ["--model", str(EMOJI), "--device", "cpu"]


@pytest.fixture(scope="module", autouse=True)
def _rates_measured_once() -> Iterator[None]:
    """Every command of bench takes a second or two to find out how fast the machine is; here only the first does."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(rates, "measure_rates", functools.cache(rates.measure_rates))
        yield


def told(capsys: pytest.CaptureFixture[str]) -> str:
    """What was printed on standard output, line ends apart."""
    return " ".join(capsys.readouterr().out.split())


def test_bench_writes_tables_plots_and_raw_numbers_and_goes_on(tmp_path, capsys):
    asked = ["bench", *MODEL, "--configs", "stock", "half", "xformers", "--batch", "1", "2", "--steps", "1"]
    asked += ["--size", "64", "--rounds", "2", "--pairs", "1", "--out", str(tmp_path)]
    assert main(asked) == 0
    printed = told(capsys)
    assert "vs baseline" in printed
    assert "unsupported" in printed
    raw = json.loads((tmp_path / "results.json").read_text())
    rows = {(row["case"], row["batch"]): row for row in raw["rows"]}
    assert set(rows) == {(case, batch) for case in ("stock", "half", "xformers") for batch in (1, 2)}
    assert [len(rows["stock", batch]["seconds"]) for batch in (1, 2)] == [2, 2]
    assert rows["stock", 1]["verdict"] == "exact"
    assert "xFormers runs on cuda" in rows["xformers", 1]["reason"]
    assert raw["environment"]["matmul_tflops"] > 0
    assert raw["environment"]["versions"]["torch"]
    table = (tmp_path / "results.md").read_text()
    assert "| stock | float32 | 1 |" in table
    assert "exact in float16" in table or "exact in bfloat16" in table
    assert (tmp_path / "results.csv").read_text().count("\n") == 7
    with Image.open(tmp_path / "times.png") as plot:
        assert plot.width > 500
    # the same command again measures nothing anew
    assert main([*asked, "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert [row["seconds"] for row in again["rows"]] == [row["seconds"] for row in raw["rows"]]


def test_a_suite_on_another_model_has_the_published_numbers_beside(tmp_path, capsys):
    section = read_suite("diffusers-docs").sections[0]
    asked = ["bench", *MODEL, "--suite", "diffusers-docs", "--section", section.name, "--configs", section.baseline]
    asked += ["--size", "64", "--steps", "1", "--rounds", "1", "--pairs", "0", "--out", str(tmp_path)]
    assert main(asked) == 0
    printed = told(capsys)
    assert "published on" in printed
    assert "TITAN RTX" in printed
    assert "published on" in (tmp_path / section.name / "results.md").read_text()


def test_a_configuration_that_a_section_lacks_is_measured_beside_it_or_unknown(tmp_path, capsys):
    asked = ["bench", *MODEL, "--suite", "peers", "--section", "deepcache-512", "--batch", "1", "--size", "64"]
    asked += ["--steps", "1", "--rounds", "1", "--pairs", "0", "--json", "--out", str(tmp_path)]
    assert main([*asked, "--configs", "stock", "sdpa"]) == 0
    assert [row["case"] for row in json.loads(capsys.readouterr().out)["rows"]] == ["stock", "sdpa"]
    assert main([*asked, "--configs", "stock", "spda"]) == 2
    assert "no case 'spda' (did you mean sdpa?)" in capsys.readouterr().err
    assert main([*asked[:4], "deepcache-1"]) == 2


def test_configurations_of_the_users_own(tmp_path, capsys):
    own = tmp_path / "own.toml"
    own.write_text('[mine]\ndescription = "mine"\nswitches = [{ action = "enable_channels_last" }]\n')
    asked = ["bench", *MODEL, "--cases", str(own), "--configs", "stock,mine", "--steps", "1", "--rounds", "1"]
    assert main([*asked, "--pairs", "0", "--out", str(tmp_path / "out")]) == 0
    assert "mine" in told(capsys)
    own.write_text('[mine]\nswitch = "enable_channels_last"\n')
    assert main([*asked, "--out", str(tmp_path / "other")]) == 2
    assert "own.toml, [mine]: found unknown key 'switch'" in capsys.readouterr().err


def test_bench_attention(tmp_path, capsys):
    asked = ["bench", "attention", "--tokens", "32", "64", "--backends", "naive,sdpa auto,xformers", "--rounds", "1"]
    assert main([*asked, "--device", "cpu", "--out", str(tmp_path)]) == 0
    assert "xFormers runs on cuda" in told(capsys)
    points = json.loads((tmp_path / "attention.json").read_text())["points"]
    peaks = {(point["backend"], point["tokens"]): point["peak_bytes"] for point in points}
    assert peaks["naive", 64] > 3 * peaks["naive", 32]
    assert (tmp_path / "attention.png").exists()
    assert main(["bench", "attention", "--backends", "flush", "--device", "cpu"]) == 2
    assert "--backends: found flush; needed: names among naive" in capsys.readouterr().err


def test_without_matplotlib_the_numbers_stand(tmp_path, monkeypatch, capsys):
    import builtins

    sound = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError("No module named 'matplotlib'", name=name)
        return sound(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    asked = ["bench", *MODEL, "--configs", "stock", "--steps", "1", "--rounds", "1", "--pairs", "0"]
    assert main([*asked, "--out", str(tmp_path)]) == 0
    assert "no plots: " in capsys.readouterr().err
    assert (tmp_path / "results.md").exists()
    assert not (tmp_path / "times.png").exists()


def test_bench_list(capsys):
    assert main(["bench", "--list"]) == 0
    printed = told(capsys)
    assert "stock diffusers as it comes" in printed
    assert "pytorch-blog" in printed


def test_verify_says_exact_and_writes_the_sheet(tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    asked = ["verify", *MODEL, "--configs", "channels-last", "--steps", "1", "--pairs", "1", "--out", str(sheet)]
    assert main(asked) == 0
    assert "exact (promised: exact)" in told(capsys)
    assert sheet.exists()
    assert main([*asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"]["level"] == "exact"
    assert found["ours"]["psnr_db"] > 90


def test_verify_fails_when_a_promise_is_broken(monkeypatch, capsys):
    from diffusers_turbo.actions.apply import APPLY
    from diffusers_turbo.planning import options as opt

    sound = APPLY[opt.ChannelsLast]

    def faulty(pipe: Any, given: Any) -> Any:
        journal = sound(pipe, given)
        journal.set_attribute(pipe.unet.mid_block, "forward", lambda hidden_states, *args, **kwargs: hidden_states)
        return journal

    monkeypatch.setitem(APPLY, opt.ChannelsLast, faulty)
    assert main(["verify", *MODEL, "--configs", "channels-last", "--steps", "2", "--pairs", "1"]) == 1
    assert "DIFFERENT (promised: exact)" in told(capsys)


def test_generate(tmp_path, capsys):
    out = tmp_path / "new" / "rocket.png"
    asked = ["generate", "a flat emoji of rocket", *MODEL, "--steps", "2", "--out", str(out)]
    assert main([*asked, "--images", "2", "--json"]) == 0
    told_json = json.loads(capsys.readouterr().out)
    assert [Path(name).name for name in told_json["files"]] == ["rocket-1.png", "rocket-2.png"]
    assert told_json["report"]["plan"]["steps"]
    assert told_json["report"]["plan"]["request"]["steps"] == 2
    with Image.open(told_json["files"][0]) as first, Image.open(told_json["files"][1]) as second:
        assert first.size == (128, 128)
        assert first.tobytes() != second.tobytes()
    assert main([*asked, "--plain", "--cache-dir", str(tmp_path / "kept")]) == 0
    assert not (tmp_path / "kept").exists(), "nothing was compiled"
    with Image.open(out) as plain, Image.open(told_json["files"][0]) as first:
        assert plain.tobytes() == first.tobytes()  # the same seed; on a CPU the plan is the trace, the same bits


def test_probe_and_plan(capsys):
    assert main(["probe", "--device", "cpu"]) == 0
    assert "SDPA kernels: flash" in told(capsys)
    assert main(["probe", "--card", "T4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sm"] == [7, 5]
    assert main(["plan", "--arch", "sd15", "--card", "RTX 3060", "--size", "768x512", "--steps", "4", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [plan["request"][name] for name in ("width", "height", "steps")] == [768, 512, 4]
    assert [stage["stage"] for stage in plan["predicted"]["stages"]] == ["encode", "denoise", "decode"]
    assert plan["predicted"]["margin"] == 0.15, "no peak was measured on an RTX 3060"
    read = json.loads(Plan.from_json(json.dumps(plan)).to_json())
    assert read == {name: plan[name] for name in plan if name != "predicted"}
    asked = ["plan", "--arch", "sd15", "--card", "H100", "--tier", "compiled", "--json"]
    assert main([*asked, "--cache-dir", "kept"]) == 0
    steps = {step["action"]: step["options"] for step in json.loads(capsys.readouterr().out)["steps"]}
    assert steps["compile_unet"]["cache_dir"] == steps["compile_vae"]["cache_dir"] == "kept"
    assert main(["plan", "--arch", "sd15", "--card", "GTX 1650", "--dtype", "float32"]) == 0
    assert "Plan for StableDiffusionPipeline" in told(capsys)


REFUSALS: dict[str, tuple[list[str], str]] = {
    "no model": (["bench"], "neither --model nor --arch"),
    "two models": (["bench", *MODEL, "--arch", "sd15"], "both --model and --arch"),
    "a path that is not there": (["bench", "--model", "./nowhere"], "loading ./nowhere: found no such folder"),
    "a folder that is no model": (["bench", "--model", str(EMOJI.parent)], "a folder without model_index.json"),
    "an unknown configuration": (["bench", *MODEL, "--configs", "sdpq"], "did you mean sdpa"),
    "a size between": (["bench", *MODEL, "--size", "100"], r"100x100; needed: multiples of 8.*try --size 96x96"),
    "a size that is none": (["bench", *MODEL, "--size", "big"], "pixels such as 512 or 768x512"),
    "a card that is not here": (
        ["bench", "--model", str(EMOJI), "--device", "cuda:7"],
        "choose another, such as",
    ),
    "an unknown device": (["bench", "--model", str(EMOJI), "--device", "gpu"], "correct it"),
    "an unknown architecture": (["plan", "--arch", "sd16"], "did you mean .*'sd15'"),
    "an unknown card": (["plan", "--arch", "sd15", "--card", "RTX 3061"], "try GeForce RTX 3060"),
    "an unknown suite": (["bench", "--suite", "photorom"], "did you mean photoroom"),
    "an unknown section": (["bench", "--suite", "photoroom", "--section", "x"], "no section 'x'"),
    "an unknown scheduler": (["bench", *MODEL, "--scheduler", "dim"], "did you mean 'ddim'"),
    "an unknown baseline": (["bench", *MODEL, "--baseline", "sdpa"], "--baseline sdpa: found no such configuration"),
    "no rounds": (["bench", *MODEL, "--rounds", "0"], "rounds"),
    "two configurations to verify": (["verify", *MODEL, "--configs", "a,b"], "2 configurations"),
    "no folder for what is compiled": (["generate", "a", *MODEL, "--cache-dir", ""], "cache_dir"),
    "no pictures": (["generate", "a", *MODEL, "--images", "0"], "1 or more"),
    "a picture of no format": (["generate", "a", *MODEL, "--out", "a.txt"], ".png, .jpg or .webp"),
    "a dtype that is none": (["bench", *MODEL, "--dtype", "int4"], "float32, float16 or bfloat16"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_are_one_line_and_leave_nothing(name, tmp_path, monkeypatch, capsys):
    arguments, text = REFUSALS[name]
    monkeypatch.chdir(tmp_path)
    if "cuda:7" in arguments and torch.cuda.device_count() > 7:
        pytest.skip("this machine has that card")
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.strip().splitlines()
    assert line.startswith("diffusers-turbo: ")
    assert re.search(text, line), line
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_half_written_file_of_results_is_left_alone(tmp_path, capsys):
    (tmp_path / "results.json").write_text('{"format_version": 1, "rows": [')
    assert main(["bench", *MODEL, "--out", str(tmp_path)]) == 2
    assert "move it away or choose another --out" in capsys.readouterr().err
    assert (tmp_path / "results.json").read_text() == '{"format_version": 1, "rows": ['


def test_an_unwritable_folder(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["bench", *MODEL, "--out", str(tmp_path / "file" / "out")]) == 2
    assert "a folder that can be made and written to" in capsys.readouterr().err


def test_usage_errors_of_the_parser(capsys):
    assert main(["bench", "--no-such-option"]) == 2
    assert "No such option" in capsys.readouterr().err
    assert main(["--help"]) == 0
    assert "bench" in capsys.readouterr().out


def test_lists_and_sizes():
    assert spread_lists(["--batch", "1", "2", "--size", "8"]) == ["--batch", "1", "--batch", "2", "--size", "8"]
    assert spread_lists(["generate", "a cat", "--steps", "2"]) == ["generate", "a cat", "--steps", "2"]
    assert height_and_width("768x512") == (512, 768)
    assert height_and_width("512") == (512, 512)


def test_without_the_extra_it_says_what_to_install():
    code = (
        "import importlib.util, sys\n"
        "real = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name in ('typer', 'rich') else real(name, *a)\n"
        "from diffusers_turbo.__main__ import main\n"
        "sys.exit(main(['probe']))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 2
    assert 'pip install "diffusers-turbo[cli]"' in found.stderr


def test_the_module_is_the_command():
    found = subprocess.run(
        [sys.executable, "-m", "diffusers_turbo", "probe", "--card", "CPU", "--json"], capture_output=True, text=True
    )
    assert json.loads(found.stdout)["name"] == "CPU"
