"""xFormers is used where a real call of it works, and refused with its own words where not."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch

from diffusers_turbo.attention import AttentionLayer, XFormersAttnProcessor, best_memory_efficient, xformers
from diffusers_turbo.errors import MissingPackageError
from tests import dynamo
from tests.attention.cases import layer
from tests.attention.reference import distance, reference

CUDA = torch.device("cuda")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _forget_trials():
    trial = xformers.trial
    trial.cache_clear()
    yield
    trial.cache_clear()


def refusing(*args, **kwargs):
    raise NotImplementedError("No operator found for `forward`:\n  wasn't built with CUDA")


def test_a_missing_package_is_named(monkeypatch, real_import):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(MissingPackageError, match=r"importing xformers: found ModuleNotFoundError: No module named"):
        XFormersAttnProcessor()(layer(), torch.randn(1, 5, 32))
    assert "pip install xformers" in xformers.trial(CPU, torch.float32, 40)


def test_a_package_for_another_torch_is_as_good_as_missing(monkeypatch, real_import):
    def broken(name):
        raise RuntimeError("operator xformers::x does not exist")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(MissingPackageError, match="operator xformers::x does not exist"):
        xformers.load_ops()


def test_installed_is_not_usable(monkeypatch, fake_xformers):
    monkeypatch.setattr(fake_xformers, "memory_efficient_attention", refusing)
    found = xformers.trial(CPU, torch.float16, 40)
    assert found == "a trial call of xFormers failed: No operator found for `forward`: wasn't built with CUDA"


def test_a_trial_that_gives_nan_is_refused(monkeypatch, fake_xformers):
    monkeypatch.setattr(fake_xformers, "memory_efficient_attention", lambda q, *_, **__: q * float("nan"))
    assert xformers.trial(CPU, torch.float16, 40) == "a trial call of xFormers gave NaN"


def test_a_trial_is_made_once_for_each_device_dtype_and_head_size(monkeypatch, fake_xformers):
    calls = []
    works = fake_xformers.memory_efficient_attention

    def counting(query, *args, **kwargs):
        calls.append((query.dtype, query.shape[-1]))
        return works(query, *args, **kwargs)

    monkeypatch.setattr(fake_xformers, "memory_efficient_attention", counting)
    for _ in range(2):
        for dtype, head_dim in ((torch.float16, 40), (torch.float16, 80), (torch.float32, 40)):
            assert xformers.trial(CPU, dtype, head_dim) is None
    assert calls == [(torch.float16, 40), (torch.float16, 80), (torch.float32, 40)]


def test_running_out_of_memory_is_no_verdict(monkeypatch, fake_xformers):
    works = fake_xformers.memory_efficient_attention

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(fake_xformers, "memory_efficient_attention", full)
    with pytest.raises(torch.OutOfMemoryError):
        xformers.trial(CPU, torch.float16, 40)
    monkeypatch.setattr(fake_xformers, "memory_efficient_attention", works)
    assert xformers.trial(CPU, torch.float16, 40) is None


@pytest.mark.parametrize(("verdict", "reasons"), [(None, []), ("a trial call failed: x", ["a trial call failed: x"])])
def test_reasons_here_ask_the_kernel_only_where_the_limits_allow(monkeypatch, verdict, reasons):
    asked = []
    monkeypatch.setattr(xformers, "trial", lambda *args: asked.append(args) or verdict)
    on_gpu = AttentionLayer(heads=8, head_dim=40, dtype=torch.float16, device=CUDA, sm=(8, 0))
    assert XFormersAttnProcessor().reasons_here(on_gpu) == reasons
    assert asked == [(CUDA, torch.float16, 40, None)]
    on_cpu = AttentionLayer(heads=8, head_dim=40, dtype=torch.float16, device=CPU)
    assert XFormersAttnProcessor().reasons_here(on_cpu) == ["xFormers runs on cuda, the layer is on cpu"]
    assert len(asked) == 1


def test_the_chosen_operator_is_passed_on(monkeypatch, fake_xformers):
    works, seen = fake_xformers.memory_efficient_attention, []

    def noting(*args, op=None, **kwargs):
        seen.append(op)
        return works(*args, **kwargs)

    monkeypatch.setattr(fake_xformers, "memory_efficient_attention", noting)
    pair = (SimpleNamespace(NAME="cutlassF-pt"), SimpleNamespace(NAME="cutlassB-pt"))
    XFormersAttnProcessor(pair)(layer(), torch.randn(1, 5, 32))
    assert seen == [pair]


@pytest.mark.parametrize(("head_dim", "masked"), [(8, False), (13, True)], ids=["", "odd-masked"])
def test_compiled_it_is_one_operator_with_a_gradient(head_dim, masked):
    attn = layer(dim_head=head_dim, cross_attention_dim=16)
    hidden, context = torch.randn(2, 33, 32, requires_grad=True), torch.randn(2, 7, 16, requires_grad=True)
    mask = (torch.rand(2, 1, 7) > 0.6) * -100.0 if masked else None
    wanted = reference(attn, hidden, context, None if mask is None else mask[:, None])
    attn.set_processor(XFormersAttnProcessor())
    weights = torch.randn_like(wanted)
    wanted_gradients = torch.autograd.grad(wanted, [hidden, context, attn.to_k.weight], weights)

    output = torch.compile(attn, backend="aot_eager", fullgraph=True)(hidden, context, attention_mask=mask)
    gradients = torch.autograd.grad(output, [hidden, context, attn.to_k.weight], weights)
    assert distance(output, wanted) < 1e-5
    assert max(map(distance, gradients, wanted_gradients)) < 1e-5


def test_the_operator_keeps_its_promises_to_the_compiler():
    query, key = torch.randn(2, 9, 3, 8, requires_grad=True), torch.randn(2, 7, 3, 8, requires_grad=True)
    torch.library.opcheck(
        torch.ops.diffusers_turbo.xformers_attention.default, (query, key, key, None, 0.3, "", ""), rtol=1e-4, atol=1e-4
    )


def test_operators_are_named_to_the_compiler_by_their_name(monkeypatch):
    cutlass, flash = SimpleNamespace(NAME="cutlassF-pt"), SimpleNamespace(NAME="fa2F")
    monkeypatch.setattr(importlib, "import_module", lambda name: SimpleNamespace(ALL_FW_OPS=[cutlass, flash]))
    assert xformers._op_names((flash, None)) == ("fa2F", "")
    assert xformers._op_named("ALL_FW_OPS", "fa2F") is flash
    assert xformers._op_named("ALL_FW_OPS", "") is None


@pytest.mark.parametrize(
    ("verdict", "method"),
    [(None, "enable_xformers_memory_efficient_attention"), ("refused", "enable_sdpa")],
)
def test_the_best_memory_efficient_attention(monkeypatch, verdict, method):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(xformers, "trial", lambda *args: verdict)
    assert best_memory_efficient(CUDA) == method
    assert best_memory_efficient(CPU) == "enable_sdpa"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [13, 40, 64, 160, 512])
def test_the_real_kernels_work_on_a_gpu_compiled_too(dtype, head_dim):
    dynamo.reset()
    assert xformers.trial(torch.device("cuda", 0), dtype, head_dim) is None
    attn = layer(dtype, "cuda", dim_head=head_dim, cross_attention_dim=16)
    wide = layer(torch.float32, "cuda", dim_head=head_dim, cross_attention_dim=16)
    wide.load_state_dict(attn.state_dict())
    hidden, context = (torch.randn(2, n, w, device="cuda", dtype=dtype) for n, w in ((100, 32), (77, 16)))
    mask = (torch.rand(2, 1, 77, device="cuda") > 0.6) * -10000.0
    mask[..., 0] = 0
    processor = XFormersAttnProcessor()
    attn.set_processor(processor)
    tolerance = processor.tolerance[dtype]
    weights = torch.randn(2, 100, 32, device="cuda")
    inputs = hidden.float().requires_grad_()
    for bias in (None, mask):
        wanted = reference(wide, inputs, context.float(), None if bias is None else bias[:, None])
        (wanted_gradient,) = torch.autograd.grad(wanted, inputs, weights)
        for run in (attn, torch.compile(attn, backend="aot_eager", fullgraph=True)):
            states = hidden.detach().requires_grad_()
            output = run(states, context, attention_mask=bias)
            assert distance(output, wanted) < tolerance.output
            (gradient,) = torch.autograd.grad(output, states, weights.to(dtype))
            assert distance(gradient, wanted_gradient) < tolerance.gradient
