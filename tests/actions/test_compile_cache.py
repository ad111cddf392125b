"""Compiled code goes to disk after the calls that made it and comes back before the first; spoilt files stay unread."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from diffusers_turbo import TurboError, turbo
from diffusers_turbo.actions import compile_cache
from diffusers_turbo.actions.compile_cache import KeptOnDisk, ShelfOnDisk, key_of
from diffusers_turbo.compilation.call import WatchedCall
from diffusers_turbo.compilation.counts import Counts
from diffusers_turbo.planning.options import CompileUNet
from tests import tiny


class Torch:
    """Stands for torch's store of artifacts: what was made in this process, and what was brought back into it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: dict[str, list[str]] = defaultdict(list)
        self.loaded: list[bytes] = []
        monkeypatch.setattr(torch.compiler, "save_cache_artifacts", self.save)
        monkeypatch.setattr(torch.compiler, "load_cache_artifacts", self.load)

    def save(self) -> tuple[bytes, Any]:
        return repr(sorted(self.made["inductor"])).encode(), SimpleNamespace(artifacts=self.made)

    def load(self, data: bytes) -> Any:
        self.loaded.append(data)
        return SimpleNamespace(artifacts={})


@pytest.fixture
def store(monkeypatch) -> Torch:
    return Torch(monkeypatch)


class Process:
    """What one process has of a component: its module with a compiled call, and the scope around a pipeline's calls."""

    def __init__(self, folder: Path, store: Torch, model: nn.Module | None = None) -> None:
        self.store = store
        store.made.clear()
        compile_cache._present.clear()
        module = model or nn.Linear(2, 2)
        self.call = WatchedCall(module, module.forward, axes=None, must_compile=False)
        self.scope = KeptOnDisk(module, CompileUNet(cache_dir=folder), [SimpleNamespace(compiled=self.call)])

    def run(self, *makes: str) -> None:
        """One call of the pipeline that compiles these graphs."""
        with self.scope.around_call(None):
            self.call.before_compiling()
            self.store.made["inductor"] += makes
            self.call.counts += Counts(misses=len(makes))

    @property
    def told(self) -> str:
        return " ".join(self.scope.tell())


def only_file(folder: Path) -> Path:
    (file,) = folder.iterdir()
    return file


def test_what_one_process_made_another_one_loads(tmp_path, store):
    folder = tmp_path / "cache"
    first = Process(folder, store)
    first.run("a")
    assert "nothing yet in" in first.told
    assert f"written to {only_file(folder)}" in first.told
    assert "1 made anew" in first.told
    second = Process(folder, store)
    second.run()
    assert store.loaded == [b"['a']"]
    assert f"loaded from {only_file(folder)}" in second.told
    assert "written" not in second.told


def test_what_two_components_files_both_hold_is_loaded_once(tmp_path, store, monkeypatch):
    folder = tmp_path / "cache"
    other = nn.Linear(3, 3)
    other.config = {"of": "another architecture"}
    first, second = Process(folder, store), Process(folder, store, other)
    first.run("a")
    second.run("b")
    first, second = Process(folder, store), Process(folder, store, other)
    second.run()
    first.run()
    assert store.loaded == [b"['a', 'b']"]
    assert "is there already" in first.told
    # torch looks elsewhere now, and there is nothing
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "another"))
    again = KeptOnDisk(first.scope.root, first.scope.options, first.scope.modules)
    with again.around_call(None):
        again.load()
    assert store.loaded == [b"['a', 'b']", b"['a']"]


def test_what_this_process_made_is_not_loaded(tmp_path, store):
    process = Process(tmp_path / "cache", store)
    process.run("a")
    again = KeptOnDisk(process.scope.root, process.scope.options, process.scope.modules)
    with again.around_call(None):
        again.load()
    assert store.loaded == []


def test_it_is_written_only_after_calls_that_made_something(tmp_path, store, monkeypatch):
    folder = tmp_path / "cache"
    process = Process(folder, store)
    process.run()
    assert list(folder.iterdir()) == []
    process.run("a")
    written = only_file(folder).stat().st_mtime_ns
    process.run()
    assert only_file(folder).stat().st_mtime_ns == written
    assert store.loaded == []


def test_a_process_that_used_less_keeps_what_others_made(tmp_path, store):
    folder = tmp_path / "cache"
    Process(folder, store).run("a")
    Process(folder, store).run("b")
    store.loaded.clear()
    Process(folder, store).run()
    assert store.loaded == [b"['a']", b"['b']"]


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), "truncated or changed bytes"),
        (lambda file: file.chmod(0o666), "can be written to by its group and everybody"),
        (lambda file: file.write_bytes(b"?"), "a header that cannot be read"),
    ],
)
def test_a_spoilt_file_is_not_loaded_and_made_anew(tmp_path, store, caplog, spoil, reason):
    folder = tmp_path / "cache"
    Process(folder, store).run("a")
    spoil(only_file(folder))
    process = Process(folder, store)
    process.run("a")
    assert store.loaded == []
    assert reason in caplog.text
    assert reason in process.told
    Process(folder, store).run()
    assert store.loaded == [b"['a']"]


def test_a_folder_others_can_write_is_not_used(tmp_path, store, caplog):
    folder = tmp_path / "cache"
    Process(folder, store).run("a")
    folder.chmod(0o777)
    process = Process(folder, store)
    process.run("b")
    assert store.loaded == []
    assert "not used: using the folder" in process.told
    assert "can be written to by its group and everybody" in caplog.text
    folder.chmod(0o700)
    Process(folder, store).run()
    assert store.loaded == [b"['a']"]


def test_a_full_disk_only_warns(tmp_path, store, caplog, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    process = Process(tmp_path / "cache", store)
    with monkeypatch.context() as patch:
        patch.setattr("diffusers_turbo.compilation.cache.os.replace", full)
        process.run("a")
    assert "No space left on device" in caplog.text
    assert "not written" in process.told


def test_torchs_own_refusal_only_warns(tmp_path, store, caplog, monkeypatch):
    folder = tmp_path / "cache"
    Process(folder, store).run("a")
    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", lambda data: None)
    Process(folder, store).run()
    assert "torch could not read the artifacts" in caplog.text


def test_a_cast_reads_another_file(tmp_path, store):
    folder, model = tmp_path / "cache", nn.Linear(2, 2)
    Process(folder, store, model).run("a")
    process = Process(folder, store, model)
    process.run()
    model.to(torch.bfloat16)
    process.run("b")
    assert store.loaded == [b"['a']"]
    assert len(list(folder.iterdir())) == 2


def test_keys_differ_by_what_decides_about_the_code():
    unet, options = tiny.unet(), CompileUNet()
    key = key_of(unet, options)
    assert key == key_of(tiny.unet(), CompileUNet(cache_dir=True))
    others = [
        key_of(tiny.unet(block_out_channels=(32, 32)), options),
        key_of(tiny.unet().to(torch.float16), options),
        key_of(unet, CompileUNet(mode="max-autotune")),
        key_of(tiny.vae(), options),
    ]
    assert len({str(other) for other in [key, *others]}) == 5
    assert key["torch"] == torch.__version__
    assert set(key) >= {"device", "sm", "triton", "diffusers", "diffusers-turbo", "cuda"}


def test_a_copied_pipeline_has_a_cache_of_its_own(tmp_path):
    pipe = turbo(tiny.sd())
    pipe.compile_unet(cache_dir=tmp_path / "cache")
    twin = copy.deepcopy(pipe)
    (scope,) = twin._turbo_ledger.top("compile_unet").journal.scopes
    assert scope.root is twin.unet
    assert scope.modules[0].compiled is twin.unet._compiled_call_impl
    assert not (tmp_path / "cache").exists(), "nothing is read or written before a call"


def test_only_inductors_code_can_be_kept():
    with pytest.raises(TurboError, match=r"compile_unet\(cache_dir=True\).*backend=\"inductor\""):
        CompileUNet(cache_dir=True, backend="eager")
    with pytest.raises(TurboError, match="True, False, None or a folder"):
        CompileUNet(cache_dir="")


def shelf(folder: Path) -> ShelfOnDisk:
    """Where code of a linear layer's calls lies, as in a new process."""
    module = nn.Linear(2, 2)
    disk = KeptOnDisk(module, CompileUNet(cache_dir=folder), [])
    with disk.around_call(None):
        return ShelfOnDisk(disk, module)


def test_code_of_calls_lies_in_a_file_for_each_signature_the_newest_variant_first(tmp_path):
    folder = tmp_path / "cache"
    assert shelf(folder).read("a") == []
    shelf(folder).write("a", "one", b"1")
    shelf(folder).write("a", "two", b"2")
    shelf(folder).write("b", "one", b"3")
    shelf(folder).write("a", "one", b"4")
    assert shelf(folder).read("a") == [b"4", b"2"]
    assert shelf(folder).read("b") == [b"3"]
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o600}


def test_code_made_under_other_settings_of_the_compiler_is_another(tmp_path):
    shelf(tmp_path / "cache").write("a", "one", b"1")
    with torch._inductor.config.patch(max_autotune=True):
        assert shelf(tmp_path / "cache").read("a") == []


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), "truncated or changed bytes"),
        (lambda file: file.chmod(0o666), "can be written to by its group and everybody"),
    ],
)
def test_spoilt_code_of_a_call_is_not_run_and_made_anew(tmp_path, caplog, spoil, reason):
    folder = tmp_path / "cache"
    shelf(folder).write("a", "one", b"1")
    spoil(only_file(folder))
    assert shelf(folder).read("a") == []
    assert reason in caplog.text
    assert "a call's code is made anew" in caplog.text
    shelf(folder).write("a", "one", b"2")
    assert shelf(folder).read("a") == [b"2"]


def test_in_a_folder_that_others_can_write_no_code_is_kept(tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir()
    folder.chmod(0o777)
    shelf(folder).write("a", "one", b"1")
    assert shelf(folder).read("a") == []
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("options", [{"regional": True}, {"dynamic": True}])
def test_code_of_small_modules_and_code_for_all_sizes_is_kept_by_torchs_artifacts_alone(tmp_path, options):
    pipe = turbo(tiny.sd())
    pipe.compile_unet(cache_dir=tmp_path / "cache", **options)
    (scope,) = pipe._turbo_ledger.top("compile_unet").journal.scopes
    with scope.around_call(pipe):
        assert {module.compiled.kept for module in scope.modules} == {None}


CHILD = """
import sys, types
import torch
from torch._dynamo.utils import compilation_time_metrics, counters
from diffusers_turbo.actions.compiling import apply
from diffusers_turbo.planning.options import CompileUNet

class Product(torch.nn.Module):
    # products alone: Inductor makes a wrapper around torch's own kernel, and no C++ has to be compiled
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(float(sys.argv[2]) * torch.ones(8, 8))

    def forward(self, x):
        return x @ self.weight


pipe = types.SimpleNamespace(unet=Product())
journal = apply(pipe, CompileUNet(cache_dir=sys.argv[1]))
for rows in map(int, sys.argv[3:]):
    with torch.no_grad(), journal.scopes[0].around_call(pipe):
        product = pipe.unet(torch.ones(rows, 8))
    assert torch.equal(product, torch.full((rows, 8), 8 * float(sys.argv[2]))), product
print("bytecode_tracing" in compilation_time_metrics, counters["frames"]["ok"])
print(counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"])
print(*journal.told())
"""


@pytest.fixture
def process(tmp_path, monkeypatch):
    """Runs a child with the real Inductor, and with a cache folder of torch's that is empty: weight, rows of calls."""
    runs = []

    def run(*arguments: int) -> list[str]:
        runs.append(monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / f"torchs {len(runs)}")))
        command = [sys.executable, "-c", CHILD, str(tmp_path / "cache"), *map(str, arguments)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()

    return run


@pytest.mark.slow
def test_a_second_process_neither_traces_nor_compiles_its_first_size(process):
    """Its weights are others, which the code must not hold; a second process of other sizes compiles for itself."""
    first, second, other = process(1, 2), process(5, 2), process(1, 3)
    assert first[0] == "True 0"
    assert "Product: traced and compiled here, and kept" in first[2]
    assert second[:2] == ["False 0", "0 0"]
    assert "Product: neither traced nor compiled: found on disk" in second[2]
    assert "written" not in second[2]
    assert "traced and compiled here" in other[2]


@pytest.mark.slow
def test_a_second_process_compiles_no_other_size_either(process):
    first, second = process(1, 2, 3), process(1, 2, 3)
    assert first[0] == "True 1"
    assert first[1] == "0 1"
    assert second[:2] == ["True 1", "1 0"]
    assert "found on disk" in second[2]
    assert "MiB loaded from" in second[2]
    assert "1 graphs found in torch's cache, 0 made anew" in second[2]
    assert "written" not in second[2]
