"""Every number and name of the recipe in one place: data sources, captions, model sizes, training constants."""

from __future__ import annotations

from dataclasses import dataclass

IMAGE_SIZE = 128  # pixels, square
LATENT_CHANNELS = 4
MAX_TOKENS = 77  # CLIP's context length
VOCAB_SIZE = 2048


@dataclass(frozen=True, kw_only=True)
class Package:
    """A published npm package, pinned by version and by the registry's SHA-512 integrity string."""

    name: str
    version: str
    integrity: str

    @property
    def spec(self) -> str:
        return f"{self.name}@{self.version}"

    @property
    def tarball(self) -> str:
        """File name that `npm pack` writes: '@scope/name' becomes 'scope-name-version.tgz'."""
        return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.tgz"


EMOJIBASE = Package(
    name="emojibase-data",
    version="17.0.0",
    integrity="sha512-Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==",
)
STYLES: dict[str, Package] = {
    "flat": Package(
        name="@iconify-json/fluent-emoji-flat",
        version="1.2.6",
        integrity="sha512-RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
    ),
    "gradient": Package(
        name="@iconify-json/fluent-emoji",
        version="1.2.7",
        integrity="sha512-D8G6bKAyIsyxP1rzZtIWr/gg/fO4Rg1+DyCWlfqKK4h8W+4Em/Y0P6QYgJUQTlUcagzJvSyg+9OBv4hz4Hc/QA==",
    ),
    "3d": Package(
        name="@lobehub/fluent-emoji-3d",
        version="1.1.0",
        integrity="sha512-Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
    ),
    "noto": Package(
        name="@iconify-json/noto",
        version="1.2.9",
        integrity="sha512-DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
    ),
}

# emojibase groups kept: smileys, animals, food, travel, activities, objects. People, symbols and flags are left
# out: they are hundreds of near-copies of one drawing.
GROUPS = (0, 3, 4, 5, 6, 7)


def caption(style: str, label: str, tags: list[str] | None = None) -> str:
    """The sentence that the model is trained on.

    >>> caption("flat", "red apple", ["fruit"])
    'a flat emoji of red apple, fruit'
    """
    return ", ".join([f"a {style} emoji of {label}", *(tags or [])])


VAE_CONFIG = {
    "sample_size": IMAGE_SIZE,
    "latent_channels": LATENT_CHANNELS,
    "block_out_channels": (32, 64, 64, 128),
    "layers_per_block": 1,
    "norm_num_groups": 16,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "scaling_factor": 1.0,  # the latents are whitened inside quant_conv, see models.whiten
    "force_upcast": False,
}
TEXT_WIDTH = 128
TEXT_CONFIG = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": TEXT_WIDTH,
    "intermediate_size": 4 * TEXT_WIDTH,
    "projection_dim": TEXT_WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_TOKENS,
    "bos_token_id": VOCAB_SIZE - 2,
    "eos_token_id": VOCAB_SIZE - 1,
    "pad_token_id": VOCAB_SIZE - 1,
}
UNET_CHANNELS = (128, 128, 192)
UNET_CONFIG = {
    "sample_size": IMAGE_SIZE // 8,
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "block_out_channels": UNET_CHANNELS,
    "layers_per_block": 1,
    "norm_num_groups": 16,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": TEXT_WIDTH,
    # diffusers reads `attention_head_dim` as the number of heads here: every head is 32 wide, which all kernels take.
    "attention_head_dim": tuple(c // 32 for c in UNET_CHANNELS),
}
# The schedule of Stable Diffusion 1.x, so that every scheduler of diffusers can be swapped in.
SCHEDULER_CONFIG = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "prediction_type": "epsilon",
}


@dataclass(frozen=True, kw_only=True)
class Training:
    """Constants of one training stage. `seconds` is wall time: the learning rate reaches zero when it is over."""

    seconds: float
    batch: int
    peak_lr: float
    warmup_steps: int
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    clip_norm: float = 1.0
    ema_decay: float = 0.999
    ema_every: int = 10  # steps between two updates of the average
    max_steps: int | None = None  # for smoke runs


VAE_TRAINING = Training(seconds=60, batch=32, peak_lr=1e-3, warmup_steps=200)
UNET_TRAINING = Training(seconds=420, batch=256, peak_lr=1e-3, warmup_steps=500)

KL_WEIGHT = 1e-4  # nats of an average latent element against L1 of an average pixel in [-1, 1]
EDGE_WEIGHT = 0.5
EMPTY_CAPTION_RATE = 0.1  # trains the unconditional branch of classifier-free guidance
MIN_SNR_GAMMA = 5.0  # https://arxiv.org/abs/2303.09556
CAPTION_VARIANTS = 8  # per image: five plain sentences, two with random tags, one with the label alone

EVAL_PROMPTS = 100
EVAL_SEED = 1234
EVAL_STEPS = 20
GUIDANCE_SCALES = (2.0, 4.0, 7.5)
