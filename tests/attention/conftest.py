"""A stand-in for xFormers, whose kernels exist for CUDA alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from diffusers_turbo.attention import xformers as module


def _check(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Refuse what the real operators refuse: xformers/ops/fmha/common.py and cutlass.py, not_supported_reasons."""
    batch, n_query, heads, head_dim = query.shape
    assert key.shape == value.shape == (batch, key.shape[1], heads, head_dim)
    assert query.dtype == key.dtype == value.dtype
    assert head_dim % 8 == 0
    assert all(x.stride(-1) == 1 and x.stride(-2) % 8 == 0 for x in (query, key, value))
    if bias is not None:
        assert bias.shape == (batch, heads, n_query, key.shape[1])
        assert bias.dtype == query.dtype
        assert all(stride % 8 == 0 for stride in bias.stride()[:-1])
        assert bias.stride(-1) <= 1


def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
    _check(query, key, value, attn_bias)
    scores = torch.einsum("bnhd,bmhd->bhnm", query.float(), key.float()) * scale
    if attn_bias is not None:
        scores = scores + attn_bias
    return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), value.float()).to(query.dtype)


def forward_requires_grad(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
    output = memory_efficient_attention(query, key, value, attn_bias, p, scale)
    scores = torch.einsum("bnhd,bmhd->bhnm", query.float(), key.float()) * scale
    if attn_bias is not None:
        scores = scores + attn_bias
    # The real log-sum-exp is padded to a multiple of 32 queries.
    return output, torch.nn.functional.pad(scores.logsumexp(-1), (0, -query.shape[1] % 32))


def backward(grad, output, lse, query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
    assert lse.shape == (query.shape[0], query.shape[2], query.shape[1])
    query, key, value, grad = (x.float() for x in (query, key, value, grad))
    scores = torch.einsum("bnhd,bmhd->bhnm", query, key) * scale
    weights = (scores if attn_bias is None else scores + attn_bias).sub(lse[..., None]).exp()
    rows = torch.einsum("bnhd,bnhd->bhn", grad, output.float())
    inner = weights * (torch.einsum("bnhd,bmhd->bhnm", grad, value) - rows[..., None]) * scale
    grads = (
        torch.einsum("bhnm,bmhd->bnhd", inner, key),
        torch.einsum("bhnm,bnhd->bmhd", inner, query),
        torch.einsum("bhnm,bnhd->bmhd", weights, grad),
    )
    return tuple(x.to(output.dtype) for x in grads)


@pytest.fixture(autouse=True)
def fake_xformers(request, monkeypatch):
    """xFormers' documented functions on any device, unless the test is for the real ones."""
    if "gpu" in request.keywords or "real_import" in request.fixturenames:
        return None
    ops = SimpleNamespace(
        memory_efficient_attention=memory_efficient_attention,
        memory_efficient_attention_forward_requires_grad=forward_requires_grad,
        memory_efficient_attention_backward=backward,
    )
    monkeypatch.setattr(module, "load_ops", lambda: ops)
    return ops


@pytest.fixture
def real_import():
    """Asks for xFormers as it is installed here, or not."""


@pytest.fixture(autouse=True)
def _one_thread():
    """Small tensors: threads cost more than they bring, and two cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
