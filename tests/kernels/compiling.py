"""Compile what a call would launch for a GPU that is not there, and print what came of it.

The interpreter accepts what the compiler does not, and says nothing of registers and vector loads. Triton's compiler
and NVIDIA's assembler come with the package and need no GPU. The kernels' own functions are called with full-size
tensors on the CPU, which nobody reads; every launch is compiled with the arguments it was given. Run it as
`python -m tests.kernels.compiling float16`, where Triton's interpreter is off.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from diffusers_turbo.kernels import (
    add_layer_norm,
    base,
    bias_residual,
    geglu,
    group_norm,
    group_norm_device,
    linear_geglu,
    upsample_conv,
)
from diffusers_turbo.kernels.lazy import LazyKernel

DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
SM = {"_linear_geglu_kernel": 90}
"""Other kernels are compiled for 80."""


class Recorder:
    """Stands where Triton's kernel does: compiles each variant once, as a launch would, and launches nothing."""

    def __init__(self, function: Any, found: dict[str, Any]) -> None:
        self.function, self.found = function, found

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self.compile

    def compile(self, *args: Any, num_warps: int, num_stages: int = 3, **constants: int) -> None:
        signature, attributes = {}, {}
        for index, (parameter, value) in enumerate(zip(self.function.params, args, strict=False)):
            kind = type(value)
            if kind is torch.Tensor:
                signature[parameter.name] = "*" + DTYPES[value.dtype]
            elif kind.__name__ == "TensorDescriptor":
                signature[parameter.name] = f"tensordesc<{DTYPES[value.base.dtype]}{list(value.block_shape)}>"
            else:
                signature[parameter.name] = {int: "i32", float: "fp32"}[kind]
            divisible = kind is torch.Tensor or (kind is int and value % 16 == 0 and not parameter.do_not_specialize)
            if divisible:
                attributes[(index,)] = [["tt.divisibility", 16]]
        signature |= dict.fromkeys(constants, "constexpr")
        name = f"{self.function.__name__} {list(signature.values())} {constants} {num_warps} {sorted(attributes)}"
        if name not in self.found:
            self.found[name] = {"kernel": self.function.__name__} | compiled(
                self.function, signature, constants, attributes, {"num_warps": num_warps, "num_stages": num_stages}
            )


def compiled(function: Any, signature: Any, constants: Any, attributes: Any, options: Any) -> dict[str, Any]:
    """Bytes of a load and of a store (the widest), what the assembler says of registers and spills, Hopper's ways."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(function, signature, constants, attributes)
    target = GPUTarget("cuda", SM.get(function.__name__, 80), 32)
    made = triton.compile(source, target=target, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(made.asm["cubin"])
        tool = triton.knobs.nvidia.cuobjdump.path
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True)
    ways = {what: what in made.asm["ptx"] for what in ("wgmma.mma_async", "cp.async.bulk.tensor")}
    words = {
        what: max(map(width, re.findall(rf"\b{what}\.global\S*", made.asm["ptx"])), default=0) for what in ("ld", "st")
    }
    usages = {key.lower(): int(n) for key, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout)}
    return ways | words | usages | {"shared": made.metadata.shared}


def width(instruction: str) -> int:
    """Bytes that one thread moves: `ld.global.v4.b32` 16."""
    vector, bits = re.search(r"\.v(\d)", instruction), re.search(r"\.b(\d+)", instruction)
    return (int(vector[1]) if vector else 1) * int(bits[1] if bits else 0) // 8


def main(dtype: torch.dtype) -> None:
    """The launches of SD1.5 at 512 with guidance and of its VAE, and of SDXL's widths."""
    base.device_reasons = lambda *_: []
    modules = (group_norm, geglu, add_layer_norm, bias_residual, linear_geglu, upsample_conv)
    for module in modules:
        module.device_reasons = base.device_reasons
    group_norm_device.single_kernel.load(), geglu._geglu_kernel.load(), add_layer_norm._add_layer_norm_kernel.load()
    bias_residual._bias_residual_kernel.load(), linear_geglu._linear_geglu_kernel.load()
    upsample_conv._upsample_conv_weight_kernel.load()
    linear_geglu._multiprocessors = lambda device: 132
    found: dict[str, Any] = {}
    for module in modules:
        for name, item in list(vars(module).items()):
            if name in ("_gelu", "_tile", "_taps", "_store_taps"):  # parts of a kernel
                continue
            if isinstance(item, LazyKernel) or type(item).__name__ == "JITFunction":
                kernel = item.load() if isinstance(item, LazyKernel) else item
                setattr(module, name, Recorder(kernel, found))

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype)

    images = ((320, 64), (320, 32), (640, 32), (960, 32), (960, 16), (1280, 16), (1920, 16), (2560, 8), (128, 512))
    for channels, side in images:
        x = empty(2, channels, side, side).to(memory_format=torch.channels_last)
        group_norm.group_norm(x, 32, *empty(2, channels), silu=True, add=empty(2, channels))
        group_norm.group_norm(x, 32, *empty(2, channels), before=empty(channels))
        bias_residual.bias_residual(x, x, empty(channels))
    for wide in (320, 640, 1280):
        geglu.geglu(empty(2, 64, 8 * wide))
        add_layer_norm.add_layer_norm(*empty(2, 2, 64, wide), *empty(2, wide))
    for channels in (1280, 640, 256):
        # without the convolution in between, which the CPU would really compute
        upsample_conv._weight_op(empty(channels, 3, 3, channels).movedim(-1, 1), [])
        for bias in (empty(channels), None):
            upsample_conv._interleave_op(empty(1, 17, 17, 4 * channels).movedim(-1, 1), bias, [])
    if dtype != torch.float32:
        for rows, wide in ((2048, 1280), (128, 1280)):
            linear_geglu.linear_geglu(empty(rows, wide), empty(8 * wide, wide), empty(8 * wide))
    print(json.dumps(list(found.values())))


if __name__ == "__main__":
    main(getattr(torch, sys.argv[1]))
