"""Which calls get the code that is kept: those like the first, while the module is what it was; all others do not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from diffusers_turbo.compilation import kept_call
from diffusers_turbo.compilation.call import WatchedCall
from diffusers_turbo.compilation.kept_call import KeptCall, as_text, whole_signature
from diffusers_turbo.compilation.looked_at import LookedAt
from tests import tiny


class Code:
    """Stands for compiled code: looks at one attribute of the module, and counts what becomes of it."""

    made = 0
    fails: Exception | None = None

    def __init__(self, looked_at: LookedAt) -> None:
        self.looked_at, self.name, self.ready, self.ran = looked_at, repr(looked_at), False, 0

    @classmethod
    def make(cls, module: nn.Module, args: Any, kwargs: Any, mode: str | None) -> Code:
        if cls.fails:
            raise cls.fails
        cls.made += 1
        sources = ["module.scale", "type(module._modules['inner'].processor)"]
        sources += [f"module._modules['inner'].{name}" for name in ("scale", "padding", "_internal_dict['size']")]
        return cls(LookedAt.now(sources, [], {"module": module}))

    @classmethod
    def from_bytes(cls, data: bytes) -> Code:
        return cls(LookedAt(**eval(data)))

    def to_bytes(self) -> bytes:
        return repr(vars(self.looked_at)).encode()

    def make_ready(self) -> None:
        self.ready = True

    def why_not(self, module: nn.Module, args: Any, kwargs: Any, *, files: bool = True) -> str | None:
        return self.looked_at.difference({"module": module}, files=files)

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        assert self.ready
        self.ran += 1
        if module.broken:
            raise module.broken
        return module._call_impl(*args, **kwargs)


class Shelf:
    def __init__(self) -> None:
        self.holds: dict[str, dict[str, bytes]] = {}

    def read(self, signature: str) -> list[bytes]:
        return list(self.holds.get(signature, {}).values())

    def write(self, signature: str, name: str, data: bytes) -> None:
        self.holds.setdefault(signature, {})[name] = data


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.padding, self.processor = 2, (1, 1), _Plain()
        self._internal_dict = {"size": 1}


class _Plain: ...


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.inner = Inner()
        self.scale = 1
        self.broken: Exception | None = None

    def forward(self, x: torch.Tensor, by: float = 1.0) -> torch.Tensor:
        return x * self.weight * self.scale * by


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch):
    monkeypatch.setattr(Code, "made", 0)
    monkeypatch.setattr(Code, "fails", None)
    monkeypatch.setattr(kept_call, "KeptCode", Code)
    with torch.no_grad():
        yield


def kept(shelf: Shelf | None = None) -> KeptCall:
    return KeptCall(Scaled(), shelf or Shelf(), mode=None)


ONES = (torch.ones(3),)


def test_the_first_process_makes_it_the_second_finds_it():
    shelf = Shelf()
    first = kept(shelf)
    assert first.code_for(ONES, {}) is first.code_for(ONES, {}) is not None
    second = kept(shelf)
    assert second.code_for((torch.rand(3),), {}) is not None
    assert Code.made == 1
    assert first.tell() == ["Scaled: traced and compiled here, and kept"]
    assert second.tell() == ["Scaled: neither traced nor compiled: found on disk"]


def test_other_arguments_and_modes_go_the_compilers_way():
    call = kept()
    assert call.code_for(ONES, {}) is not None
    for args, kwargs in [
        ((torch.ones(4),), {}),
        ((torch.ones(3, dtype=torch.float16),), {}),
        (ONES, {"by": 1.0}),
        ((torch.ones(6)[::2],), {}),
    ]:
        assert call.code_for(args, kwargs) is None
    with torch.enable_grad():
        assert call.code_for(ONES, {}) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert call.code_for(ONES, {}) is None
    assert call.code_for(ONES, {}) is not None
    assert Code.made == 1


@pytest.mark.parametrize(
    ("where", "other"),
    [
        ("scale", 5),
        ("inner.scale", 5),
        ("inner.padding", (0, 0)),
        ("inner._internal_dict", {"size": 2}),
        ("inner.processor", object()),
    ],
)
def test_a_module_that_changed_goes_the_compilers_way_until_it_is_as_it_was(where, other):
    call = kept()
    assert call.code_for(ONES, {}) is not None
    *path, name = where.split(".")
    owner = call.module.get_submodule(".".join(path))
    before = getattr(owner, name)
    setattr(owner, name, other)
    call.look_again()
    assert call.code_for(ONES, {}) is None
    assert call.code_for(ONES, {}) is None, "nothing changed since, and it still does not fit"
    setattr(owner, name, before)
    call.look_again()
    assert call.code_for(ONES, {}) is not None


def test_a_processor_exchanged_in_the_middle_of_a_pipelines_call_is_seen():
    call = kept()
    assert call.code_for(ONES, {}) is not None
    call.module.inner.processor = object()
    assert call.code_for(ONES, {}) is None


def test_weights_may_change_all_the_time():
    call = kept()
    call.code_for(ONES, {})
    call.module.weight = nn.Parameter(torch.full((3,), 2.0))
    call.look_again()
    assert call.code_for(ONES, {}) is not None


def test_what_is_on_disk_for_another_module_is_left_there_beside_what_is_made():
    shelf = Shelf()
    kept(shelf).code_for(ONES, {})
    other = kept(shelf)
    other.module.scale = 7
    assert other.code_for(ONES, {}) is not None
    assert Code.made == 2
    ((_, variants),) = shelf.holds.items()
    assert len(variants) == 2
    for scale in (7, 1):
        again = kept(shelf)
        again.module.scale = scale
        assert again.code_for(ONES, {}) is not None
    assert Code.made == 2


def test_what_cannot_be_read_is_made_anew():
    shelf = Shelf()
    kept(shelf).code_for(ONES, {})
    ((signature, variants),) = shelf.holds.items()
    shelf.holds[signature] = dict.fromkeys(variants, b"no code at all")
    assert kept(shelf).code_for(ONES, {}) is not None
    assert Code.made == 2


def test_what_cannot_be_made_is_told_and_not_tried_again(monkeypatch):
    monkeypatch.setattr(Code, "fails", RuntimeError("a graph break"))
    call = kept()
    assert call.code_for(ONES, {}) is None
    monkeypatch.setattr(Code, "fails", None)
    assert call.code_for(ONES, {}) is None
    assert call.tell() == ["Scaled: traced in each process, since RuntimeError: a graph break"]


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (lambda module: module.register_forward_hook(lambda *_: None), "carries forward hooks"),
        (lambda module: setattr(module, "drop", nn.Dropout(0.5)), "is in training mode"),
        (lambda module: torch.set_grad_enabled(True), "gradients are recorded"),
    ],
)
def test_what_is_not_kept_is_told(prepare, reason):
    call = kept()
    prepare(call.module)
    assert call.code_for(ONES, {}) is None
    assert reason in call.tell()[0]
    assert Code.made == 0


def test_arguments_that_cannot_be_told_by_value_are_not_kept():
    call = kept()
    assert call.code_for(ONES, {"by": object()}) is None
    assert "more than tensors and plain values" in call.tell()[0]


def watched(error: Exception | None = None) -> WatchedCall:
    """A compiled call whose compiler only calls the module, under code that is kept."""
    module = Scaled()
    call = WatchedCall(module, module.forward, axes=None, must_compile=False)
    call.kept = KeptCall(module, Shelf(), mode=None)
    call.kept.code_for(ONES, {})
    module.broken = error
    return call


def test_a_call_runs_the_kept_code_and_others_ask_for_torchs_artifacts_first():
    call, asked = watched(), []
    call.before_compiling = lambda: asked.append(True)
    assert torch.equal(call(*ONES), torch.ones(3))
    assert call.kept.code.ran == 1
    assert not asked
    assert torch.equal(call(*ONES, by=2.0), torch.full((3,), 2.0))
    assert call.kept.code.ran == 1
    assert asked == [True]


def test_kept_code_that_fails_is_given_up_and_the_compiler_takes_over():
    call = watched(RuntimeError("no such kernel"))
    assert torch.equal(call(*ONES), torch.ones(3))
    assert "traced in each process, since RuntimeError: no such kernel" in call.kept.tell()[0]
    assert torch.equal(call(*ONES), torch.ones(3))


def test_memory_that_runs_out_is_no_failure_of_the_code():
    call = watched(torch.OutOfMemoryError("out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        call(*ONES)
    call.module.broken = None
    assert torch.equal(call(*ONES), torch.ones(3))
    assert call.kept.code.ran == 2


def test_signatures_are_the_same_text_for_the_same_call():
    unet, other = tiny.unet(), tiny.unet()
    args, kwargs = (torch.ones(2, 4, 8, 8), torch.tensor(3)), {"encoder_hidden_states": torch.ones(2, 7, 8), "x": None}
    text = as_text(whole_signature(unet, args, kwargs))
    assert text == as_text(whole_signature(other, tuple(a + 1 for a in args), dict(kwargs)))
    assert "0x" not in text
