"""Everything about a pipeline and the process that an action could leave behind, as comparable data."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def state_of(pipe: Any) -> dict[str, Any]:
    """Take down attributes, hooks, modules, processors, strides, devices, bits and process-wide flags."""
    state: dict[str, Any] = {"flags": global_flags(), "pipe": _attributes(pipe)}
    for component, root in pipe.components.items():
        if isinstance(root, nn.Module):
            for path, module in root.named_modules():
                state[f"{component}.{path}"] = _attributes(module)
                for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
                    if tensor is not None:
                        state[f"{component}.{path}.{name}"] = _tensor(tensor)
        elif component == "scheduler":
            # its values change with every call; which attributes it has of its own does not
            state["scheduler"] = (type(root).__name__, id(root), tuple(sorted(vars(root))))
    return state


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Name what differs between two states."""
    changed = []
    for key in before.keys() | after.keys():
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            parts = [name for name in old.keys() | new.keys() if old.get(name) != new.get(name)]
            changed += [f"{key}: {name}: {old.get(name)} -> {new.get(name)}" for name in parts]
        elif old != new:
            changed.append(f"{key}: {old} -> {new}")
    return sorted(changed)


def global_flags() -> dict[str, Any]:
    """Read the process-wide switches that speed levers are known to touch."""
    backends = torch.backends
    return {
        "matmul": backends.cuda.matmul.fp32_precision,
        "conv": backends.cudnn.conv.fp32_precision,
        "benchmark": backends.cudnn.benchmark,
        "flash": backends.cuda.flash_sdp_enabled(),
        "efficient": backends.cuda.mem_efficient_sdp_enabled(),
        "math": backends.cuda.math_sdp_enabled(),
        "cudnn": backends.cuda.cudnn_sdp_enabled(),
        "grad": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
    }


def _attributes(thing: Any) -> dict[str, Any]:
    """Own attributes by name: plain values as they are, everything else by class and identity."""
    plain = (bool, int, float, str, type(None))
    skipped = {"_parameters", "_buffers"}
    shown = {}
    for name, value in vars(thing).items():
        if name in skipped:
            continue
        if isinstance(value, (dict, list, tuple, set)):
            shown[name] = (type(value).__name__, len(value))
        else:
            shown[name] = value if isinstance(value, plain) else (type(value).__name__, id(value))
    return shown


def _tensor(tensor: torch.Tensor) -> dict[str, Any]:
    return {
        "id": id(tensor),
        "dtype": tensor.dtype,
        "device": str(tensor.device),
        "stride": tensor.stride(),
        "shape": tuple(tensor.shape),
        "bits": _bits(tensor.detach()),
    }


def _bits(tensor: torch.Tensor) -> int | None:
    """A number that any changed bit changes: a hash on the CPU; on a GPU, where weights are large, a sum of words."""
    if tensor.device.type == "meta":
        return None
    if tensor.device.type == "cpu":
        return hash(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}.get(tensor.element_size(), torch.uint8)
    return int(tensor.contiguous().reshape(-1).view(words).sum(dtype=torch.int64))
