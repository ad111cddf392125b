"""Memsets of a few bytes in a captured graph, done by a kernel instead: a graph goes from kernel to kernel faster.

cuDNN's attention and some of cuBLAS's products set a counter to zero before they run. Captured, each becomes a memset
node of four bytes, and on an H100 the kernels around it wait 5.3 us for it, where two kernels lie 0.1 us apart: 233
times in a step of SDXL. A kernel that writes the same bytes is a node like the others.

Source: https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__GRAPH.html
"""

from __future__ import annotations

import ctypes
import sys
from ctypes import POINTER, byref, c_size_t, c_uint, c_uint64, c_void_p
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch

WORDS = 64
"""Longer memsets stay: they are few, and what is said above is nothing beside their own time."""

MEMSET, ALLOCATION, FREEING = 2, 10, 11
"""Kinds of nodes (CUgraphNodeType): the one looked for, and two beside which no node may be removed."""

LOSSY_QUERY = 402
"""CUDA_ERROR_LOSSY_QUERY: an edge says more than that one node runs after the other."""

FILL = b"""
.version 6.0
.target sm_50
.address_size 64
.visible .entry fill(.param .u64 target, .param .u32 value, .param .u32 words)
{
    .reg .pred %outside;
    .reg .b32 %index, %value, %words;
    .reg .b64 %target, %offset;
    mov.u32 %index, %tid.x;
    ld.param.u32 %words, [words];
    setp.ge.u32 %outside, %index, %words;
    @%outside bra done;
    ld.param.u32 %value, [value];
    ld.param.u64 %target, [target];
    cvta.to.global.u64 %target, %target;
    mul.wide.u32 %offset, %index, 4;
    add.s64 %target, %target, %offset;
    st.global.u32 [%target], %value;
done:
    ret;
}
"""


@dataclass(frozen=True)
class Memset:
    """What a memset node writes: `height` rows of `width` elements of `size` bytes."""

    target: int
    value: int
    size: int
    width: int
    height: int

    def words(self) -> tuple[int, int] | None:
        """Return value and count of the 32-bit words that it writes; None where it is long, or not made of words.

        >>> Memset(target=256, value=1, size=1, width=8, height=1).words()
        (16843009, 2)
        """
        length = self.size * self.width
        if self.height != 1 or length % 4 or self.target % 4 or not 0 < length <= 4 * WORDS:
            return None
        value = self.value & (1 << 8 * self.size) - 1
        return int.from_bytes(value.to_bytes(self.size, "little") * (4 // self.size), "little"), length // 4


class Driver(Protocol):
    """What is asked of CUDA; graphs and nodes are its handles."""

    def nodes(self, graph: int) -> list[int]:
        """Return all nodes of a graph."""

    def kind(self, node: int) -> int:
        """Return the kind of a node."""

    def memset(self, node: int) -> Memset:
        """Return what a memset node sets."""

    def neighbours(self, node: int) -> tuple[list[int], list[int]] | None:
        """Return the nodes before and after a node; None where an edge is more than one after the other."""

    def add_fill(self, graph: int, before: list[int], target: int, value: int, words: int) -> int:
        """Add a kernel that writes words, to be run after some nodes."""

    def link(self, graph: int, node: int, after: list[int]) -> None:
        """Let some nodes run after a node."""

    def remove(self, node: int) -> None:
        """Remove a node with its edges."""


def memsets_by_kernels(graph: int, driver: Driver) -> int:
    """Replace the short memsets of a captured graph that is not instantiated yet; return how many there were.

    None is, where the graph allocates memory itself (the allocator cudaMallocAsync): its nodes can't be removed.

    Args:
        graph: as `torch.cuda.CUDAGraph.raw_cuda_graph()` returns it.
        driver: of the device that it was captured on, which is the current one.

    Raises:
        RuntimeError: CUDA refused; the graph must not be used.
    """
    count = 0
    kinds = {node: driver.kind(node) for node in driver.nodes(graph)}
    if not {ALLOCATION, FREEING}.isdisjoint(kinds.values()):
        return 0
    for node in (node for node, kind in kinds.items() if kind == MEMSET):
        memset = driver.memset(node)
        words = memset.words()
        around = driver.neighbours(node) if words else None
        if words is None or around is None:
            continue
        before, after = around
        driver.link(graph, driver.add_fill(graph, before, memset.target, *words), after)
        driver.remove(node)
        count += 1
    return count


class _KernelParameters(ctypes.Structure):
    """CUDA_KERNEL_NODE_PARAMS_v1."""

    _fields_ = (
        ("function", c_void_p),
        *((f"{what}_{axis}", c_uint) for what in ("grid", "block") for axis in "xyz"),
        ("shared_bytes", c_uint),
        ("parameters", POINTER(c_void_p)),
        ("extra", POINTER(c_void_p)),
    )


class _MemsetParameters(ctypes.Structure):
    """CUDA_MEMSET_NODE_PARAMS_v1."""

    _fields_ = (
        ("target", c_uint64),
        ("pitch", c_size_t),
        ("value", c_uint),
        ("size", c_uint),
        ("width", c_size_t),
        ("height", c_size_t),
    )


class CudaDriver:
    """CUDA's driver, with the kernel loaded for the current device."""

    def __init__(self) -> None:
        """Find the driver, and let it compile the kernel.

        Raises:
            OSError: no driver of NVIDIA's.
            RuntimeError: it refused the kernel.
        """
        self.library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        module, self.fill = c_void_p(), c_void_p()
        self._call("cuModuleLoadData", byref(module), ctypes.c_char_p(FILL))
        self._call("cuModuleGetFunction", byref(self.fill), module, ctypes.c_char_p(b"fill"))

    def _call(self, name: str, *arguments: Any, may_be: int = 0) -> int:
        status: int = getattr(self.library, name)(*arguments)
        if status not in (0, may_be):
            raise RuntimeError(f"{name} returned {status}")
        return status

    def nodes(self, graph: int) -> list[int]:
        """Return all nodes of a graph."""
        return self._listed("cuGraphGetNodes", graph) or []

    def kind(self, node: int) -> int:
        """Return the kind of a node."""
        kind = ctypes.c_int()
        self._call("cuGraphNodeGetType", c_void_p(node), byref(kind))
        return kind.value

    def memset(self, node: int) -> Memset:
        """Return what a memset node sets."""
        found = _MemsetParameters()
        self._call("cuGraphMemsetNodeGetParams", c_void_p(node), byref(found))
        return Memset(found.target, found.value, found.size, found.width, found.height)

    def neighbours(self, node: int) -> tuple[list[int], list[int]] | None:
        """Return the nodes before and after a node; None where an edge is more than one after the other."""
        before = self._listed("cuGraphNodeGetDependencies", node)
        after = self._listed("cuGraphNodeGetDependentNodes", node)
        return None if before is None or after is None else (before, after)

    def add_fill(self, graph: int, before: list[int], target: int, value: int, words: int) -> int:
        """Add a kernel that writes words, to be run after some nodes."""
        values = (c_uint64(target), c_uint(value), c_uint(words))
        parameters = (c_void_p * 3)(*(ctypes.addressof(x) for x in values))
        launch = _KernelParameters(self.fill.value, 1, 1, 1, WORDS, 1, 1, 0, parameters, None)
        made = c_void_p()
        nodes = (c_void_p * len(before))(*before)
        self._call("cuGraphAddKernelNode", byref(made), c_void_p(graph), nodes, c_size_t(len(before)), byref(launch))
        assert made.value is not None
        return made.value

    def link(self, graph: int, node: int, after: list[int]) -> None:
        """Let some nodes run after a node."""
        here, there = (c_void_p * len(after))(*[node] * len(after)), (c_void_p * len(after))(*after)
        self._call("cuGraphAddDependencies", c_void_p(graph), here, there, c_size_t(len(after)))

    def remove(self, node: int) -> None:
        """Remove a node with its edges."""
        self._call("cuGraphDestroyNode", c_void_p(node))

    def _listed(self, name: str, of: int) -> list[int] | None:
        """Ask for nodes: how many there are, then which."""
        count = c_size_t()
        if self._call(name, c_void_p(of), None, byref(count), may_be=LOSSY_QUERY):
            return None
        if not count.value:  # which CUDA refuses to be asked for
            return []
        nodes = (c_void_p * count.value)()
        if self._call(name, c_void_p(of), nodes, byref(count), may_be=LOSSY_QUERY):
            return None
        return [node for node in nodes if node is not None]


@cache
def driver_for(device: int) -> CudaDriver | None:
    """Return the driver with the kernel on a CUDA device, None where there is none of NVIDIA's."""
    with torch.cuda.device(device):
        try:
            torch.empty(1, device="cuda")  # the driver wants torch's context to be there
            return CudaDriver()
        except (OSError, RuntimeError):
            return None
