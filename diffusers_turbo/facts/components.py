"""One component of a pipeline: what it weighs, where it lies, and what was already done to it. Reads only."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# Tensor classes that hold quantised weights, by the package that defines them.
_QUANTISED_TENSORS = {"torchao": "torchao", "optimum": "quanto", "bitsandbytes": "bitsandbytes", "gguf": "gguf"}


@dataclass(frozen=True, kw_only=True)
class ComponentFacts:
    """One torch module of a pipeline.

    Attributes:
        name: the pipeline's attribute.
        role: "denoiser", "vae", "text_encoder", "image_encoder", "controlnet" or "other".
        class_name: the module's class.
        bytes_by_dtype: floating-point and other weights by dtype name, each storage once.
        parameter_count: how many parameters.
        devices: where the weights lie; "meta" where they are offloaded or were never made.
        largest_leaf_bytes: the largest single layer: what leaf-level and sequential offload hold at least.
        block_bytes: sizes of the blocks in each of the module's lists of blocks, as block-level offload groups them.
        rest_bytes: weights outside blocks, which block-level offload keeps on the device during a forward.
        quantised: why the weights can't be cast or moved freely, None where they can.
        device_map: how the weights are spread over devices by accelerate, None where they are not.
        hooks: offload hooks already there, such as "accelerate:CpuOffload" or "diffusers:group_offloading".
        compiled: whether torch.compile is already on it or on its blocks.
    """

    name: str
    role: str
    class_name: str
    bytes_by_dtype: Mapping[str, int] = field(default_factory=dict)
    parameter_count: int = 0
    devices: tuple[str, ...] = ()
    largest_leaf_bytes: int = 0
    block_bytes: tuple[tuple[int, ...], ...] = ()
    rest_bytes: int = 0
    quantised: str | None = None
    device_map: str | None = None
    hooks: tuple[str, ...] = ()
    compiled: bool = False

    @property
    def parameter_bytes(self) -> int:
        """All weights and buffers, each storage once."""
        return sum(self.bytes_by_dtype.values())

    @property
    def dtype(self) -> str:
        """The dtype that most of the weights have; "float32" for a component without weights."""
        return max(self.bytes_by_dtype, key=lambda name: self.bytes_by_dtype[name], default="float32")

    @property
    def refusal(self) -> str | None:
        """Why switches that touch this component's weights must refuse; None where they need not."""
        return _refusal(self.name, self.quantised, self.device_map)


def read_refusal(name: str, module: torch.nn.Module) -> str | None:
    """Read of one module only why switches that touch its weights must refuse."""
    return _refusal(name, _quantisation(module), _device_map(module))


def _refusal(name: str, quantised: str | None, device_map: str | None) -> str | None:
    if quantised:
        return f"{name} is quantised ({quantised})"
    return f"{name} is spread by a device_map ({device_map})" if device_map else None


def read_component(name: str, role: str, module: torch.nn.Module) -> ComponentFacts:
    """Read one module's facts, changing nothing."""
    tensors = list(itertools.chain(module.parameters(), module.buffers()))
    bytes_by_dtype: dict[str, int] = {}
    for tensor, size in _storages(tensors):
        key = str(tensor.dtype).removeprefix("torch.")
        bytes_by_dtype[key] = bytes_by_dtype.get(key, 0) + size
    block_bytes = _block_bytes(module)
    return ComponentFacts(
        name=name,
        role=role,
        class_name=type(module).__name__,
        bytes_by_dtype=bytes_by_dtype,
        parameter_count=sum(parameter.numel() for parameter in module.parameters()),
        devices=tuple(sorted({str(tensor.device) for tensor in tensors})),
        largest_leaf_bytes=max((_own_bytes(child) for child in module.modules()), default=0),
        block_bytes=block_bytes,
        rest_bytes=_all_bytes(module) - sum(map(sum, block_bytes)),
        quantised=_quantisation(module),
        device_map=_device_map(module),
        hooks=_hooks(module),
        compiled=any(_is_compiled(child) for child in module.modules()),
    )


def _storages(tensors: list[torch.Tensor]) -> Iterator[tuple[torch.Tensor, int]]:
    """Yield each storage once, as (a tensor on it, bytes): tied and fused weights share one."""
    seen: set[object] = set()
    for tensor in tensors:
        try:
            storage = tensor.untyped_storage()
            size, key = int(storage.nbytes()), (storage.data_ptr() or id(tensor))
        except (NotImplementedError, RuntimeError):  # tensor subclasses, such as torchao's, may have no storage
            size, key = tensor.numel() * tensor.element_size(), id(tensor)
        if key not in seen:
            seen.add(key)
            yield tensor, size


def _own_bytes(module: torch.nn.Module) -> int:
    own = itertools.chain(module.parameters(recurse=False), module.buffers(recurse=False))
    return sum(size for _, size in _storages(list(own)))


def _all_bytes(module: torch.nn.Module) -> int:
    return sum(size for _, size in _storages([*module.parameters(), *module.buffers()]))


def _block_bytes(module: torch.nn.Module) -> tuple[tuple[int, ...], ...]:
    """Return the sizes of the blocks in each list of blocks, as diffusers' group offload sees them."""
    import torch

    lists = [child for child in module.children() if isinstance(child, (torch.nn.ModuleList, torch.nn.Sequential))]
    return tuple(tuple(_all_bytes(block) for block in blocks) for blocks in lists)


def _quantisation(module: Any) -> str | None:
    """Say how a module is quantised: by its quantiser, its config, or the class of its weights."""
    config = getattr(getattr(module, "hf_quantizer", None), "quantization_config", None)
    config = config or getattr(getattr(module, "config", None), "quantization_config", None)
    if config is not None:
        method = config.get("quant_method") if isinstance(config, Mapping) else getattr(config, "quant_method", None)
        return str(getattr(method, "value", method) or type(config).__name__)
    for parameter in module.parameters():
        for cls in type(parameter).__mro__:
            package = cls.__module__.split(".")[0]
            if package in _QUANTISED_TENSORS:
                return _QUANTISED_TENSORS[package]
            if cls.__name__ == "GGUFParameter":
                return "gguf"
    flags = ("is_quantized", "is_loaded_in_8bit", "is_loaded_in_4bit")
    return next((flag for flag in flags if getattr(module, flag, False) is True), None)


def _device_map(module: Any) -> str | None:
    placement = getattr(module, "hf_device_map", None)
    if not placement:
        return None
    places = sorted({str(place) for place in placement.values()}) if isinstance(placement, Mapping) else [placement]
    return ", ".join(map(str, places))


def _hooks(module: torch.nn.Module) -> tuple[str, ...]:
    found: set[str] = set()
    for child in module.modules():
        if (hook := getattr(child, "_hf_hook", None)) is not None:
            found.add(f"accelerate:{type(hook).__name__}")
        if (registry := getattr(child, "_diffusers_hook", None)) is not None:
            found.update(f"diffusers:{name}" for name in getattr(registry, "hooks", {}))
    return tuple(sorted(found))


def _is_compiled(module: Any) -> bool:
    # torch.compile(module) wraps it into an OptimizedModule, module.compile() sets the compiled call in place
    call = getattr(module, "_compiled_call_impl", None)
    # captured graphs stand in the same place, over the compiled call if there is one
    if (inner := getattr(call, "inner", None)) is not None:
        call = None if inner == module._call_impl else inner
    # a compiled call that failed and gave way to the module's own
    if getattr(call, "failure", None) is not None:
        call = None
    return call is not None or type(module).__name__ == "OptimizedModule"
