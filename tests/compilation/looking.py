"""One process of `test_kept_code.py`: traces networks of diffusers, or looks whether they are what another one traced.

python -m tests.compilation.looking make|find FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from torch import nn
from torch._dynamo.aot_compile_types import SerializableCallable

from diffusers_turbo.compilation.kept_code import KeptCode
from tests import tiny

HEADS = {"attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 32}


class Graph(SerializableCallable):
    """Stands for Inductor's code: the graph as it was traced, of which nothing goes to disk."""

    def __init__(self, graph: Any, inputs: Any) -> None:
        self.graph = graph

    def __call__(self, *inputs: Any) -> Any:
        return self.graph(*inputs)

    @classmethod
    def serialize_compile_artifacts(cls, graph: Any) -> bytes:
        return b""

    @classmethod
    def deserialize_compile_artifacts(cls, data: bytes) -> Any:
        raise NotImplementedError


class NoInductor:
    """Stands for torch's way to Inductor."""

    def __new__(cls, *options: Any) -> Any:
        return Graph


def calls() -> dict[str, tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]:
    """Name modules, each with the arguments of a call."""
    torch.manual_seed(0)
    r, one = torch.rand, torch.ones(1)
    unet, pixart = tiny.sdxl().unet, tiny.pixart().transformer
    flux = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, axes_dims_rope=(4, 4, 8), **HEADS
    )
    sd3 = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_layers=1, caption_projection_dim=32, out_channels=4, **HEADS
    )
    ids = unet.config.addition_time_embed_dim * 6
    added = {"text_embeds": r(2, unet.config.projection_class_embeddings_input_dim - ids), "time_ids": r(2, 6)}
    text = {"encoder_hidden_states": r(1, 8, 32), "pooled_projections": r(1, 32), "timestep": one}
    places = {"img_ids": r(16, 3), "txt_ids": r(8, 3)}
    prompt = {"encoder_hidden_states": r(2, 7, unet.config.cross_attention_dim), "added_cond_kwargs": added}
    caption = {"encoder_hidden_states": r(2, 7, tiny.CONTEXT), "timestep": one.repeat(2)}
    return {
        "sdxl": (unet, (r(2, 4, 8, 8), one), prompt),
        "decoder": (tiny.vae().decoder, (r(1, 4, 8, 8),), {}),
        "pixart": (
            pixart,
            (r(2, 4, 8, 8),),
            {**caption, "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
        ),
        "flux": (flux, (), {"hidden_states": r(1, 16, 16), **text, **places}),
        "sd3": (sd3, (), {"hidden_states": r(1, 4, 16, 16), **text}),
    }


def make(file: Path, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Trace a call, and say whether its code does what the module does and still fits it."""
    code = KeptCode.make(module, args, kwargs, None)
    file.write_bytes(code.to_bytes())
    ours, as_ever = (first(call(*args, **kwargs)) for call in (lambda *a, **k: code(module, *a, **k), module))
    return f"{torch.equal(ours, as_ever)}, {code.why_not(module, args, kwargs)}"


def find(file: Path, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Say why the code does not fit the module, and whether it does under a hook."""
    code = KeptCode.from_bytes(file.read_bytes())
    as_it_was = code.why_not(module, args, kwargs)
    next(layer for layer in module.modules() if isinstance(layer, nn.Linear)).register_forward_hook(lambda *_: None)
    return f"{as_it_was}, {code.why_not(module, args, kwargs) is None}"


def first(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]


if __name__ == "__main__":
    _, what, folder = sys.argv
    torch._TorchCompileInductorWrapper = NoInductor
    for name, (module, args, kwargs) in calls().items():
        with torch.no_grad():
            print(f"{name}: {(make if what == 'make' else find)(Path(folder) / name, module.eval(), args, kwargs)}")
