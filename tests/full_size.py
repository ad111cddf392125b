"""Full-size pipelines with random weights, text encoders included: what a GPU test runs, made from config."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from tests.planning import architectures
from tests.test_exactness import EMOJI

# The configs of openai/clip-vit-large-patch14 and laion/CLIP-ViT-bigG-14 as Stable Diffusion ships them.
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
BIG_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}


def _text_encoder(cls: Any, sizes: dict[str, int], dtype: torch.dtype, device: str) -> Any:
    # the end-of-text token of the emoji tokenizer, which marks where the pooled embedding is read
    config = CLIPTextConfig(vocab_size=49408, projection_dim=sizes["hidden_size"], eos_token_id=2047, **sizes)
    with torch.device(device):
        return cls(config).to(dtype).eval()


def build(name: str, dtype: torch.dtype = torch.float16, device: str = "cuda") -> Any:
    """Make "sd15" or "sdxl" with seed 0; prompts are read by the emoji model's tokenizer."""
    torch.manual_seed(0)
    make: Any = {"sd15": architectures.sd15, "sdxl": architectures.sdxl}[name]
    pipe = make(dtype, device)
    tokenizer = CLIPTokenizer.from_pretrained(EMOJI / "tokenizer")
    pipe.register_modules(text_encoder=_text_encoder(CLIPTextModel, CLIP_L, dtype, device), tokenizer=tokenizer)
    if name == "sdxl":
        second = _text_encoder(CLIPTextModelWithProjection, BIG_G, dtype, device)
        pipe.register_modules(text_encoder_2=second, tokenizer_2=tokenizer)
    pipe.set_progress_bar_config(disable=True)
    return pipe
