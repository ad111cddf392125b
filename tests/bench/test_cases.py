"""Cases: the built-in ones are sound, files of one's own are read, and every fault in a file is named."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from diffusers_turbo import TurboError, TurboMixin
from diffusers_turbo.bench.cases import Case, Switch, builtin_cases, find_cases, read_cases
from diffusers_turbo.errors import InvalidOptionError
from diffusers_turbo.kernels import KERNELS
from diffusers_turbo.planning.options import ACTIONS, make_options

BENCHMARKS = Path(__file__).parents[2] / "docs" / "benchmarks"


@pytest.mark.parametrize("case", builtin_cases().values(), ids=lambda case: case.name)
def test_builtin_case(case):
    assert case.description
    for switch in case.switches:
        assert hasattr(TurboMixin, switch.action)
        assert make_options(switch.action, **switch.options).action == switch.action


def test_the_builtin_cases_throw_every_switch():
    thrown = {switch.action for case in builtin_cases().values() for switch in case.switches}
    # a file has to be there for that one: docs/benchmarks/exported_unet.py
    assert thrown == set(ACTIONS) - {"load_exported_unet"}


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("*.toml")), ids=lambda path: path.stem)
def test_the_cases_of_the_measurements_are_sound(path):
    cases = read_cases(path)
    assert cases.keys().isdisjoint(builtin_cases())
    for case in cases.values():
        assert case.description
        assert [switch.make_options().action for switch in case.switches] == [switch.action for switch in case.switches]


def test_the_cases_that_tell_the_fused_kernels_apart():
    cases = read_cases(BENCHMARKS / "fused-kernels.toml")
    alone = [case.switches[1].make_options().as_dict() for case in cases.values() if len(case.switches) == 3]
    kernels = list(KERNELS)
    expected = [dict.fromkeys(kernels, True), *({name: name == one for name in kernels} for one in kernels)]
    assert sorted(map(sorted, map(dict.items, alone))) == sorted(map(sorted, map(dict.items, expected)))
    assert all(case.switches[-1].action == "enable_cuda_graphs" for case in cases.values())


def test_stock_is_the_untouched_pipeline():
    stock = builtin_cases()["stock"]
    assert (stock.switches, stock.auto, stock.peer, stock.autocast, stock.dtype) == ((), None, None, None, None)


def test_a_case_survives_json():
    for case in builtin_cases().values():
        data = json.loads(json.dumps(asdict(case)))
        switches = tuple(Switch(**switch) for switch in data.pop("switches"))
        again = Case(**data, switches=switches)
        assert again == case
        assert hash(again) == hash(case)


def test_a_file_of_ones_own(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(
        """
        [fp16-channels-last]
        description = "half precision"
        dtype = "fp16"
        switches = [{ action = "enable_sdpa", backend = "flash" }, { action = "enable_channels_last" }]

        [stock]
        autocast = "bfloat16"

        [planned]
        auto = { dtype = "auto", vram_budget = "6GB" }
        """
    )
    cases = read_cases(str(file))
    assert list(cases) == ["fp16-channels-last", "stock", "planned"]
    assert cases["fp16-channels-last"] == Case(
        name="fp16-channels-last",
        description="half precision",
        dtype="float16",
        switches=(
            Switch(action="enable_sdpa", options={"backend": "flash"}),
            Switch(action="enable_channels_last"),
        ),
    )
    assert cases["planned"].auto == {"dtype": "auto", "vram_budget": "6GB"}
    found = find_cases(["naive", "stock"], file)
    assert found == (builtin_cases()["naive"], cases["stock"])
    assert find_cases(["stock"]) == (builtin_cases()["stock"],)


FAULTS = {
    "unknown key": ("[a]\nswitch = []", r"mine.toml, \[a\]: found unknown key 'switch' \(did you mean switches\?\)"),
    "name as key": ('[a]\nname = "b"', r"\[a\]: found unknown key 'name'"),
    "unknown action": (
        '[a]\nswitches = [{ action = "enable_channels_lats" }]',
        r"mine.toml, \[a\], switch 1: enable_channels_lats\(\): found no action.*enable_channels_last",
    ),
    "unknown argument": (
        '[a]\nswitches = [{ action = "enable_sdpa" }, { action = "enable_sdpa", kernel = "flash" }]',
        r"mine.toml, \[a\], switch 2: enable_sdpa\(kernel=...\): found no argument kernel",
    ),
    "bad value": (
        '[a]\nswitches = [{ action = "enable_sdpa", backend = "warp" }]',
        r"switch 1: enable_sdpa\(backend='warp'\)",
    ),
    "date as value": (
        '[a]\nswitches = [{ action = "enable_model_cpu_offload", device = 2026-01-01 }]',
        r"switch 1: enable_model_cpu_offload in a case: found datetime.date.*needed: text, numbers",
    ),
    "no action": ("[a]\nswitches = [{}]", r"\[a\], switch 1: found \{\}; needed: a key action"),
    "switch as text": ('[a]\nswitches = ["enable_sdpa"]', r"\[a\], switch 1: found 'enable_sdpa'; needed: a table"),
    "switches as text": ('[a]\nswitches = "enable_sdpa"', r"found switches = 'enable_sdpa'; needed: a list"),
    "case as text": ('a = "enable_sdpa"', r"mine.toml, \[a\]: found 'enable_sdpa'; needed: a table"),
    "dtype": ('[a]\ndtype = "int8"', r"\[a\]: case 'a': found dtype = 'int8'; needed: one of float32, float16"),
    "autocast": ('[a]\nautocast = "float32"', r"found autocast = 'float32'; needed: one of float16, bfloat16"),
    "description": ("[a]\ndescription = 1", r"found description = 1; needed: text"),
    "comma in the name": ('["a,b"]', r"found name = 'a,b'; needed: a name without commas"),
    "auto as text": ('[a]\nauto = "all"', r"found auto = 'all'; needed: a table"),
    "unknown auto argument": (
        "[a]\nauto = { exat = true }",
        r"case 'a', auto: found unknown key 'exat' \(did you mean exact\?\)",
    ),
    "bad auto value": ('[a]\nauto = { vram_budget = "lots" }', r"mine.toml, \[a\]: .*vram_budget.*lots"),
    "peer": ('[a]\npeer = "deepcash"', r"found no peer 'deepcash' \(did you mean deepcache\?\)"),
    "auto and switches": (
        '[a]\nauto = {}\nswitches = [{ action = "enable_sdpa" }]',
        r"found auto beside switches or a peer; needed: auto alone",
    ),
    "syntax": ("[a]\nauto = {\n", r"mine.toml: found a syntax error: .*line 2"),
    "name twice": ("[a]\n[a]", r"mine.toml: found a syntax error: .*line 2"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_in_a_file(fault, tmp_path):
    text, message = FAULTS[fault]
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(InvalidOptionError, match=message) as raised:
        read_cases(file)
    assert "What to do:" in str(raised.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(TurboError, match=r"none.toml: found no readable file \(FileNotFoundError.*correct the path"):
        read_cases(tmp_path / "none.toml")
    with pytest.raises(TurboError, match=r"found no readable file \(IsADirectoryError"):
        find_cases(["stock"], tmp_path)
    latin = tmp_path / "latin.toml"
    latin.write_bytes(b'[a]\ndescription = "\xe9"')
    with pytest.raises(TurboError, match=r"latin.toml: found bytes that are not UTF-8.*save it as UTF-8"):
        read_cases(latin)


def test_unknown_case():
    with pytest.raises(
        InvalidOptionError, match=r"found no case 'spda' \(did you mean sdpa.*needed: cases among stock"
    ):
        find_cases(["stock", "spda"])
    with pytest.raises(InvalidOptionError, match=r"found 'stock' twice"):
        find_cases(["stock", "stock"])


def test_a_switch_keeps_a_copy_of_its_options():
    options = {"exclude_modules": ("vae",)}
    switch = Switch(action="enable_group_offload", options=options)
    options["offload_type"] = "atoms"
    assert switch.options == {"exclude_modules": ["vae"]}
    assert switch.make_options() == make_options("enable_group_offload", exclude_modules=("vae",))
