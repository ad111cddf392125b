"""Named SDPA backends: the right operator, the right numbers, and never a flag of the process."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from diffusers_turbo.attention import SDPAAttnProcessor, read_layer, sdpa
from diffusers_turbo.attention.alignment import align_bias, whole_vectors
from diffusers_turbo.errors import InvalidOptionError, NotSupportedError
from tests.attention.cases import layer
from tests.attention.reference import distance, reference

NAMED = ["flash", "efficient", "cudnn", "math"]


def flags() -> tuple[bool, ...]:
    """Every switch of the process that SDPA reads when it chooses a kernel."""
    cuda = torch.backends.cuda
    return (
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
        cuda.math_sdp_enabled(),
        cuda.fp16_bf16_reduction_math_sdp_allowed(),
    )


def test_an_unknown_backend_is_refused():
    with pytest.raises(InvalidOptionError, match=r"found backend='fast'; needed: one of 'auto', 'flash', 'efficient'"):
        SDPAAttnProcessor("fast")


@pytest.fixture
def called(monkeypatch) -> list[str]:
    """The names of the operators that the processor calls, in order."""
    names: list[str] = []

    class Operators:
        def __getattr__(self, name: str):
            names.append(name)
            return getattr(torch.ops.aten, name)

    monkeypatch.setattr(sdpa, "_aten", Operators())
    return names


@pytest.mark.parametrize(
    ("backend", "operator"),
    [
        ("flash", "_scaled_dot_product_flash_attention"),
        ("efficient", "_scaled_dot_product_efficient_attention"),
        ("cudnn", "_scaled_dot_product_cudnn_attention"),
    ],
)
@pytest.mark.parametrize("head_dim", [40, 13])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_the_named_operator_runs_off_the_cpu(backend, operator, head_dim, masked, called):
    """On tensors without data, which any machine has: the operator, its arguments and the shape of its output."""
    query = torch.empty(2, 3, 20, head_dim, device="meta", dtype=torch.float16)
    key = torch.empty(2, 3, 77, head_dim, device="meta", dtype=torch.float16)
    mask = torch.empty(2, 1, 1, 77, device="meta", dtype=torch.float16) if masked else None
    if masked and backend == "flash":
        with pytest.raises(RuntimeError, match="takes no mask"):
            sdpa.KERNELS[backend](query, key, key, mask, 1.0)
        return
    output = sdpa.KERNELS[backend](query, key, key, mask, 1.0)
    assert output.shape == query.shape
    assert called == [operator]


@pytest.mark.parametrize(
    ("backend", "operator"),
    [("flash", "_scaled_dot_product_flash_attention_for_cpu"), ("math", "_scaled_dot_product_attention_math")],
)
def test_the_named_operator_runs_on_a_cpu(backend, operator, called):
    SDPAAttnProcessor(backend)(layer(), torch.randn(1, 5, 32))
    assert called == [operator]


@pytest.mark.parametrize("backend", ["efficient", "cudnn"])
def test_a_backend_that_is_not_for_the_device_says_so_when_run(backend):
    with pytest.raises(NotSupportedError, match=r"runs on cuda, the layer is on cpu.*use backend='auto'"):
        SDPAAttnProcessor(backend)(layer(), torch.randn(1, 5, 32))


def test_an_error_that_limits_do_not_explain_is_passed_on():
    query = torch.randn(1, 2, 5, 8)
    with pytest.raises(RuntimeError) as caught:
        SDPAAttnProcessor("math").attend(layer(), query, torch.randn(1, 2, 5, 7), query, None)
    assert not isinstance(caught.value, NotSupportedError)


def test_a_trial_call_says_what_a_kernel_says(monkeypatch):
    sdpa.trial.cache_clear()
    cpu = torch.device("cpu")
    assert sdpa.trial("flash", cpu, torch.float32, 40) is None
    assert sdpa.trial("efficient", cpu, torch.float32, 40).startswith(
        "a trial call of SDPA efficient failed: Could not run"
    )
    kernels = {"flash": lambda query, *_: query * float("nan")}
    monkeypatch.setattr(sdpa, "KERNELS", kernels)
    assert sdpa.trial("flash", cpu, torch.float32, 40) is None  # remembered
    assert sdpa.trial("flash", cpu, torch.float32, 80) == "a trial call of SDPA flash gave NaN"
    sdpa.trial.cache_clear()


@pytest.mark.parametrize(("backend", "asked"), [("auto", False), ("math", False), ("flash", True), ("cudnn", False)])
def test_reasons_here_try_a_named_kernel_that_the_limits_allow(backend, asked, monkeypatch):
    trials = []
    monkeypatch.setattr(sdpa, "trial", lambda *args: trials.append(args) or "broken driver")
    found = SDPAAttnProcessor(backend).reasons_here(read_layer("", layer()))
    assert found == (["broken driver"] if asked else SDPAAttnProcessor(backend).reasons(read_layer("", layer())))
    assert bool(trials) is asked


def test_cudnn_takes_a_single_key():
    """cuDNN itself refuses one key; the weight of a single key is one, so its value is the answer."""
    value = torch.randn(2, 3, 1, 8)
    output = SDPAAttnProcessor("cudnn").attend(layer(), torch.randn(2, 3, 5, 8), torch.randn(2, 3, 1, 8), value, None)
    assert torch.equal(output, value.expand(2, 3, 5, 8))


@pytest.mark.parametrize("bias_shape", [(1, 1, 1, 77), (2, 1, 20, 77), (2, 3, 20, 80), (2, 3, 1, 5)], ids=str)
def test_a_bias_is_aligned_without_changing_it(bias_shape):
    bias = torch.randn(bias_shape)
    aligned = align_bias(bias, 2, 3, 20)
    assert torch.equal(aligned, bias.expand(2, 3, 20, bias_shape[-1]))
    assert aligned.stride(-1) == 1
    assert all(stride % 16 == 0 for stride in aligned.stride()[:-1])


@pytest.mark.parametrize("head_dim", [8, 13, 40])
def test_heads_are_padded_to_whole_vectors(head_dim):
    states = torch.randn(2, 3, head_dim, 5).transpose(2, 3)
    (padded,) = whole_vectors(states)
    assert padded.shape[-1] % 8 == 0
    assert padded.stride(-1) == 1
    assert torch.equal(padded[..., :head_dim], states)
    assert not padded[..., head_dim:].any()


@contextmanager
def watching_flags() -> Iterator[list[tuple[bool, ...]]]:
    """Another thread that reads the flags as fast as it can; yields those it saw changed."""
    before, changed, done = flags(), [], threading.Event()

    def watch() -> None:
        while not done.is_set():
            now = flags()
            if now != before:
                changed.append(now)
            time.sleep(0)  # lets the threads under watch have the interpreter

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield changed
    finally:
        done.set()
        thread.join()
    assert flags() == before


def run_in_two_threads(backends: list[str], device: str, dtype: torch.dtype, rounds: int) -> None:
    attns = [layer(dtype, device) for _ in backends]
    hidden = torch.randn(2, 64, 32).to(device, dtype)
    wanted = reference(layer(torch.float32, device), hidden.float())
    worst: dict[str, float] = {}
    barrier = threading.Barrier(len(backends))

    def work(backend: str, attn: torch.nn.Module) -> None:
        attn.set_processor(SDPAAttnProcessor(backend))
        barrier.wait()
        with torch.no_grad():
            worst[backend] = max(distance(attn(hidden), wanted) for _ in range(rounds))

    with watching_flags() as changed:
        threads = [threading.Thread(target=work, args=pair) for pair in zip(backends, attns, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not changed
    assert worst.keys() == set(backends)
    assert max(worst.values()) < SDPAAttnProcessor.tolerance[dtype].output


def test_two_threads_with_different_backends_are_both_right_and_no_flag_is_seen_changed():
    run_in_two_threads(["flash", "math"], "cpu", torch.float32, rounds=50)


def test_the_watcher_would_see_a_changed_flag():
    """`torch.nn.attention.sdpa_kernel`, which this package does not use, is what the tests above guard against."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with watching_flags() as changed, sdpa_kernel(SDPBackend.MATH):
        while not changed:
            pass
    assert changed


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")  # torch says so of the first product in a new thread
@pytest.mark.parametrize("backends", [["flash", "cudnn"], ["efficient", "math"], ["flash", "auto"]], ids="-".join)
def test_two_threads_on_a_gpu(backends):
    run_in_two_threads(backends, "cuda", torch.float16, rounds=200)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["efficient", "cudnn", "math", "auto"])
@pytest.mark.parametrize("head_dim", [13, 40, 64])
@pytest.mark.parametrize("keys", [1, 77, 4096])
def test_masks_and_odd_sizes_on_a_gpu(backend, head_dim, keys):
    attn = layer(torch.float16, "cuda", dim_head=head_dim, cross_attention_dim=16)
    wide = layer(torch.float32, "cuda", dim_head=head_dim, cross_attention_dim=16)
    wide.load_state_dict(attn.state_dict())
    hidden, context = torch.randn(2, 50, 32).cuda().half(), torch.randn(2, keys, 16).cuda().half()
    mask = (torch.rand(2, 1, keys, device="cuda") > 0.5) * -10000.0
    mask[..., 0] = 0
    wanted = reference(wide, hidden.float(), context.float(), mask[:, None])
    attn.set_processor(SDPAAttnProcessor(backend))
    assert distance(attn(hidden, context, attention_mask=mask), wanted) < attn.processor.tolerance[torch.float16].output


@pytest.mark.gpu
def test_flash_refuses_a_mask_and_fp32_on_a_gpu():
    attn = layer(torch.float16, "cuda")
    attn.set_processor(SDPAAttnProcessor("flash"))
    hidden = torch.randn(1, 5, 32, device="cuda")
    with pytest.raises(NotSupportedError, match="takes no mask, the layer is given one"):
        attn(hidden.half(), attention_mask=torch.zeros(1, 1, 5, device="cuda"))
    with pytest.raises(NotSupportedError, match="takes float16 or bfloat16, the layer is float32"):
        attn.float()(hidden)
