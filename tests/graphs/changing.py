"""Two equal pipelines, one under graphs, and what may be changed on both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig

from diffusers_turbo import turbo
from tests import tiny
from tests.graphs.fake import FakeCapture

LORA = LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)


def twin_pipes() -> tuple[Any, Any]:
    """Two equal pipelines, one with graphs that have been captured and replayed."""
    eager, graphed = tiny.sd(), turbo(tiny.sd())
    graphed.enable_cuda_graphs()
    assert torch.equal(tiny.picture(graphed, steps=3), tiny.picture(eager, steps=3))
    assert FakeCapture.made > 0
    return eager, graphed


def unet_call(pipe: Any) -> Any:
    return pipe.unet._compiled_call_impl


def new_data(pipe: Any) -> None:
    with torch.no_grad():
        pipe.unet.conv_in.weight.data = pipe.unet.conv_in.weight.data * 2


def in_place(pipe: Any) -> None:
    with torch.no_grad():
        pipe.unet.conv_in.weight.mul_(2)


def lora(pipe: Any) -> None:
    torch.manual_seed(0)
    pipe.unet.add_adapter(LORA)


def unload(pipe: Any) -> None:
    pipe.unet.delete_adapters("default")


class Scaled:
    """An attention processor with a plain number, as IP-Adapter's have."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.scale = inner, [0.7]

    def __call__(self, attn: Any, hidden_states: Any, encoder_hidden_states: Any = None, **kwargs: Any) -> Any:
        return self.inner(attn, hidden_states, encoder_hidden_states, **kwargs) * self.scale[0]


def scaled_processors(pipe: Any) -> None:
    pipe.unet.set_attn_processor({name: Scaled(found) for name, found in pipe.unet.attn_processors.items()})


def scale(value: float) -> Callable[[Any], None]:
    def change(pipe: Any) -> None:
        for processor in pipe.unet.attn_processors.values():
            processor.scale[0] = value

    return change


CHANGES: dict[str, list[Callable[[Any], None]]] = {
    "weights exchanged": [new_data],
    "weights changed in place": [in_place],
    "a LoRA loaded": [lora],
    "a LoRA's scale": [lora, lambda pipe: pipe.unet.set_adapters("default", 0.3)],
    "a LoRA switched off": [lora, lambda pipe: pipe.unet.disable_adapters()],
    "a LoRA unloaded": [lora, unload],
    "FreeU": [lambda pipe: pipe.enable_freeu(s1=0.6, s2=0.4, b1=1.4, b2=1.6)],
    "FreeU's numbers": [
        lambda pipe: pipe.enable_freeu(s1=0.6, s2=0.4, b1=1.4, b2=1.6),
        lambda pipe: pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4),
    ],
    "FreeU off": [lambda pipe: pipe.enable_freeu(s1=0.6, s2=0.4, b1=1.4, b2=1.6), lambda pipe: pipe.disable_freeu()],
    "processors": [scaled_processors],
    "a processor's scale": [scaled_processors, scale(0.5), scale(0.25)],
    "another dtype": [lambda pipe: pipe.to(torch.bfloat16)],
    "another dtype and back": [lambda pipe: pipe.to(torch.float64), lambda pipe: pipe.to(torch.float32)],
    "another scheduler step count": [lambda pipe: None],
}
