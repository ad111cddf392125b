"""Memset nodes that kernels take the place of: the order of the graph stays, and only short ones are taken."""

from __future__ import annotations

import ctypes
from itertools import count

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusers_turbo.graphs.memsets import (
    ALLOCATION,
    FREEING,
    MEMSET,
    WORDS,
    Memset,
    driver_for,
    memsets_by_kernels,
)


class Graph:
    """A graph that runs on a bytearray: nodes are functions of it, edges say what runs before what."""

    def __init__(self) -> None:
        self.work, self.edges, self.numbers, self.kinds = {}, set(), count(1), {}

    def add(self, work, *before):
        node = next(self.numbers)
        self.work[node] = work
        self.edges |= {(other, node) for other in before}
        return node

    def run(self, memory):
        """Run every node after those before it, the latest made first where there is a choice."""
        waiting = dict(self.work)
        while waiting:
            ready = [node for node in waiting if not any(a in waiting for a, b in self.edges if b == node)]
            work = waiting.pop(max(ready))
            if isinstance(work, Memset):
                for row in range(work.height):
                    start, value = work.target + row * 32, work.value.to_bytes(4, "little")[: work.size]
                    memory[start : start + work.size * work.width] = value * work.width
            elif work is not None:
                work(memory)
        return bytes(memory)

    # what is asked of CUDA

    def nodes(self, graph):
        return list(self.work)

    def kind(self, node):
        return MEMSET if isinstance(self.work[node], Memset) else self.kinds.get(node, 0)

    def memset(self, node):
        return self.work[node]

    def neighbours(self, node):
        return [a for a, b in self.edges if b == node], [b for a, b in self.edges if a == node]

    def add_fill(self, graph, before, target, value, words):
        def fill(memory):
            memory[target : target + 4 * words] = value.to_bytes(4, "little") * words

        return self.add(fill, *before)

    def link(self, graph, node, after):
        self.edges |= {(node, other) for other in after}

    def remove(self, node):
        del self.work[node]
        self.edges = {edge for edge in self.edges if node not in edge}


def memsets(graph):
    return sum(isinstance(work, Memset) for work in graph.work.values())


def one_after_the_other(*works):
    graph, before = Graph(), ()
    for work in works:
        before = (graph.add(work, *before),)
    return graph


def increment(memory):
    for index in range(len(memory)):
        memory[index] = (memory[index] + 1) % 256


def test_what_is_written_and_when_stays():
    works = [Memset(0, 0, 4, 1, 1), increment, Memset(0, 0xAB, 1, 8, 1), Memset(4, 0x1234, 2, 4, 1), increment]
    expected = one_after_the_other(*works).run(bytearray(range(16)))
    graph = one_after_the_other(*works)
    assert memsets_by_kernels(0, graph) == 3
    assert memsets(graph) == 0
    assert graph.run(bytearray(range(16))) == expected


def test_branches_are_joined_as_before():
    graph = Graph()
    first, other = graph.add(increment), graph.add(None)
    zero = graph.add(Memset(0, 0, 4, 1, 1), first, other)
    left, right = graph.add(None, zero), graph.add(None, zero)
    last = graph.add(increment, left, right)
    assert memsets_by_kernels(0, graph) == 1
    (fill,) = graph.work.keys() - {first, other, left, right, last}
    assert graph.edges == {(first, fill), (other, fill), (fill, left), (fill, right), (left, last), (right, last)}


@pytest.mark.parametrize(
    "memset",
    [
        Memset(0, 0, 1, 4 * WORDS + 4, 1),  # long
        Memset(0, 0, 1, 6, 1),  # not of words
        Memset(2, 0, 1, 4, 1),  # between words
        Memset(0, 0, 4, 1, 2),  # of two rows
        Memset(0, 0, 4, 0, 1),  # of nothing
    ],
)
def test_other_memsets_stay(memset):
    graph = one_after_the_other(increment, memset)
    before = dict(graph.work), set(graph.edges)
    assert memsets_by_kernels(0, graph) == 0
    assert (graph.work, graph.edges) == before


@pytest.mark.parametrize("kind", [ALLOCATION, FREEING])
def test_where_memory_is_allocated_nothing_is_removed(kind):
    graph = one_after_the_other(None, Memset(0, 0, 4, 1, 1))
    graph.kinds = {1: kind}
    before = dict(graph.work), set(graph.edges)
    assert memsets_by_kernels(0, graph) == 0
    assert (graph.work, graph.edges) == before


def test_a_memset_among_other_edges_stays():
    graph = one_after_the_other(increment, Memset(0, 0, 4, 1, 1))
    graph.neighbours = lambda node: None
    assert memsets_by_kernels(0, graph) == 0
    assert memsets(graph) == 1


@given(value=st.integers(0, 2**32 - 1), size=st.sampled_from([1, 2, 4]), length=st.integers(1, 8))
def test_words_are_the_bytes_that_the_memset_writes(value, size, length):
    memset = Memset(0, value, size, 4 * length // size, 1)
    word, words = memset.words()
    written = (value % 256**size).to_bytes(size, "little") * (4 * length // size)
    assert word.to_bytes(4, "little") * words == written


def test_without_a_driver_graphs_stay_as_they_are(monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    monkeypatch.setattr(torch.cuda, "device", lambda index: pytest.MonkeyPatch.context())
    monkeypatch.setattr(torch, "empty", lambda *size, device: None)
    driver_for.cache_clear()
    assert driver_for(0) is None
    driver_for.cache_clear()


@pytest.mark.gpu
class TestOnAGPU:
    def recorded(self, run):
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            output = run()
        return graph, output

    def memsets_left(self, graph):
        driver = driver_for(0)
        nodes = driver.nodes(graph.raw_cuda_graph())
        return [driver.memset(node) for node in nodes if driver.kind(node) == MEMSET]

    def test_what_the_driver_sets_is_set_by_kernels(self):
        driver, memory = driver_for(0), torch.zeros(256, dtype=torch.int32, device="cuda")
        address = memory.data_ptr()

        def run():
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            for name, offset, value, length in (
                ("cuMemsetD8Async", 0, 0xAB, 12),
                ("cuMemsetD16Async", 16, 0x1234, 2),
                ("cuMemsetD32Async", 32, 0x12345678, WORDS),
                ("cuMemsetD8Async", 512, 7, 5),  # stays
            ):
                where = ctypes.c_uint64(address + offset)
                assert getattr(driver.library, name)(where, value, ctypes.c_size_t(length), stream) == 0
            return memory + 1

        graph, output = self.recorded(run)
        assert memsets_by_kernels(graph.raw_cuda_graph(), driver) == 3
        assert [memset.width for memset in self.memsets_left(graph)] == [5]
        graph.instantiate()
        expected = torch.zeros(256, dtype=torch.int32)
        as_bytes = expected.view(torch.uint8)
        as_bytes[:12], as_bytes[512:517] = 0xAB, 7
        as_bytes[16:20].view(torch.int16)[:] = 0x1234
        expected[8 : 8 + WORDS] = 0x12345678
        for _ in range(2):
            memory.fill_(0)
            graph.replay()
            assert torch.equal(memory.cpu(), expected)
            assert torch.equal(output.cpu(), expected + 1)

    def test_attention_by_cudnn_is_replayed_to_the_bit(self):
        from torch.nn.attention import SDPBackend, sdpa_kernel

        x = torch.randn(3, 2, 8, 1024, 64, device="cuda", dtype=torch.float16)

        def attention():
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                y = x[0]
                for _ in range(4):
                    y = torch.nn.functional.scaled_dot_product_attention(y, x[1], x[2])
                return y

        try:
            expected = attention()
        except RuntimeError as error:
            pytest.skip(f"no attention by cuDNN here: {error}")
        graph, output = self.recorded(attention)
        driver = driver_for(0)
        found = memsets_by_kernels(graph.raw_cuda_graph(), driver)
        assert self.memsets_left(graph) == []
        graph.instantiate()
        for _ in range(5):
            output.zero_()
            graph.replay()
            assert torch.equal(output, expected)
        print(f"{found} memsets in four attentions")
