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
from ..errors import NotSupportedError, explain_failure
from ..planning import options as opt
from ..planning.options import Options
from .components import denoiser_of, execution_device, modules_of
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
    denoiser_name, _ = denoiser_of(pipe, tried)
    device = execution_device(pipe)
    kept, auto, changed = Counter[str](), Counter[str](), Counter[str]()
    with journaling() as journal:
        for component, root in modules_of(pipe).items():
            for name, attn in attention_layers(root).items():
                if reason := why_kept(attn.processor):
                    kept[f"{component}: {reason}"] += 1
                    continue
                layer = _on_device(read_layer(f"{component}.{name}", attn), device)
                processor: TurboAttnProcessor = wanted
                if reasons := wanted.reasons_here(layer):
                    auto[f"{component}: {'; '.join(reasons)}"] += 1
                    processor = SDPAAttnProcessor()
                else:
                    changed[component] += 1
                journal.set_attribute(attn, "processor", processor)
        if not changed[denoiser_name]:
            refused = {k: n for k, n in (kept + auto).items() if k.startswith(f"{denoiser_name}: ")}
            found = (
                "; ".join(f"{n} layers of {k}" for k, n in refused.items()) or f"no attention layers in {denoiser_name}"
            )
            needed = f"at least one layer of the {denoiser_name} that can take it"
            raise NotSupportedError(
                explain_failure(tried, found, needed, "use another attention, or leave it as it is")
            )
        journal.note(", ".join(f"{count} layers of {component}" for component, count in changed.items()))
        for sentence, count in auto.items():
            journal.note(f"{count} layers keep torch's own choice in {sentence}")
        for sentence, count in kept.items():
            journal.note(f"{count} layers left alone in {sentence}")
    return journal


def processor_for(options: Options) -> TurboAttnProcessor:
    """Return the processor that the options describe."""
    match options:
        case opt.SDPAAttention(backend=backend):
            return SDPAAttnProcessor(backend)
        case opt.XFormersAttention(attention_op=attention_op):
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
