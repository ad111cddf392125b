"""One attention processor for every layer that can take it; a layer that cannot, or is not ours, is left and listed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..attention import (
    AttentionLayer,
    NaiveAttnProcessor,
    SDPAAttnProcessor,
    SlicedAttnProcessor,
    TurboAttnProcessor,
    XFormersAttnProcessor,
    attention_layers,
    read_layer,
    why_kept,
)
from ..attention.sliced import check_slice_size
from ..attention.xformers import load_ops
from ..errors import NotSupportedError, explain_failure
from ..facts.pipeline import execution_device
from ..planning import options as opt
from ..planning.options import Options
from .components import denoiser_of, modules_of
from .undo import Journal, journaling


@dataclass(frozen=True, kw_only=True)
class FusedAttention(opt.SDPAAttention):
    """The processors that know fused projections, put under whatever the user chose."""

    action = "fuse_qkv_projections"


def apply(pipe: Any, options: Options) -> Journal:
    """Exact: give every replaceable attention layer the processor that `options` describe.

    Raises:
        NotSupportedError: no layer of the denoiser can take it; the reasons are listed.
    """
    tried, wanted = f"{options.action}()", processor_for(options)
    denoiser_name, denoiser = denoiser_of(pipe, tried)
    device = execution_device(pipe)
    changed = Counter[str]()
    kept: dict[str, list[str]] = {}
    auto: dict[str, list[str]] = {}
    if isinstance(options, opt.SlicedAttention):
        check_slice_size(options.slice_size, (_read(denoiser_name, a) for a in attention_layers(denoiser).values()))
    with journaling() as journal:
        for component, root in modules_of(pipe).items():
            for name, attn in attention_layers(root).items():
                layer = _on_device(_read(f"{component}.{name}", attn), device)
                processor: TurboAttnProcessor = wanted
                if reason := why_kept(attn.processor, layer.kind):
                    kept.setdefault(f"{component}: {reason}", []).append(name)
                    continue
                if reasons := wanted.reasons_here(layer):
                    auto.setdefault(f"{component}: {'; '.join(reasons)}", []).append(name)
                    processor = SDPAAttnProcessor()
                else:
                    changed[component] += 1
                journal.set_attribute(attn, "processor", processor)
        if not changed[denoiser_name]:
            refused = {k: names for k, names in {**kept, **auto}.items() if k.startswith(f"{denoiser_name}: ")}
            found = "; ".join(f"{len(names)} layers of {k}" for k, names in refused.items())
            raise NotSupportedError(
                explain_failure(
                    tried,
                    found or f"no `Attention` layers in the {denoiser_name} ({type(denoiser).__name__})",
                    f"at least one layer of the {denoiser_name} that can take it",
                    "use another attention, or leave it as it is",
                )
            )
        journal.note("set on " + ", ".join(f"{count} layers of {component}" for component, count in changed.items()))
        for reason, names in auto.items():
            journal.note(f"torch's own choice kept in {reason} ({_some(names)})")
        for reason, names in kept.items():
            journal.note(f"left alone in {reason} ({_some(names)})")
    return journal


def _read(name: str, attn: Any) -> AttentionLayer:
    """Describe a layer. A transformer's cross-attention is given a mask of the prompt's padding, a UNet's is not."""
    return read_layer(name, attn, masked=name.startswith("transformer.") and attn.is_cross_attention)


def _some(names: list[str]) -> str:
    """The first three names, and how many more there are."""
    shown, more = ", ".join(names[:3]), len(names) - 3
    return f"{shown} and {more} more layers" if more > 0 else shown


def processor_for(options: Options) -> TurboAttnProcessor:
    """Return the processor that the options describe."""
    match options:
        case opt.SDPAAttention(backend=backend):
            return SDPAAttnProcessor(backend)
        case opt.XFormersAttention(attention_op=attention_op):
            load_ops()  # a missing package is told apart from a kernel that does not run
            return XFormersAttnProcessor(attention_op)
        case opt.SlicedAttention(slice_size=slice_size, max_bytes=max_bytes):
            return SlicedAttnProcessor(slice_size, max_bytes)
        case _:
            return NaiveAttnProcessor()


def _on_device(layer: AttentionLayer, device: torch.device) -> AttentionLayer:
    """Describe the layer as it will run: offloaded weights lie on the CPU and work on the accelerator."""
    if layer.device == device:
        return layer
    sm = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    return replace(layer, device=device, sm=sm)
