"""The shapes inside a pipeline: the denoiser's widths and levels, its attention layers, and the autoencoder's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..tiling.hosts import decodes_in_exact_tiles

_EXTRAS = (
    *("class_embed_type", "num_class_embeds", "time_embedding_act_fn", "time_cond_proj_dim", "addition_embed_type"),
    *("encoder_hid_dim", "encoder_hid_dim_type", "resnet_skip_time_act"),
)


@dataclass(frozen=True, kw_only=True)
class DenoiserShape:
    """Widths and levels of a denoiser, from its config.

    Attributes:
        kind: "unet" or "transformer".
        class_name: the denoiser's class.
        sample_size: latents per side that it was made for, None where the config does not say.
        block_out_channels: channels per level (UNet).
        attention_levels: whether each level has attention (UNet).
        layers_per_block: resnets per level going down (UNet).
        inner_dim: width of a token (transformer).
        layers: number of transformer blocks.
        patch_size: latents per token and side; 1 for a UNet.
        cross_attention_dim: width of the text's tokens.
        added_text_time: SDXL's extra conditioning.
        text_conditioned: whether it takes a prompt.
        distilled_guidance: whether guidance is an input instead of a second sample (Flux dev, LCM).
        extras: options in a UNet's config for what it embeds beside its time, or does with its prompt first.
    """

    kind: str
    class_name: str
    sample_size: int | None = None
    block_out_channels: tuple[int, ...] = ()
    attention_levels: tuple[bool, ...] = ()
    layers_per_block: int = 2
    inner_dim: int = 0
    layers: int = 0
    patch_size: int = 1
    cross_attention_dim: int | None = None
    added_text_time: bool = False
    text_conditioned: bool = True
    distilled_guidance: bool = False
    extras: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class AttentionFacts:
    """Alike attention layers of one component.

    Attributes:
        component: the pipeline's attribute.
        heads: heads per layer.
        head_dim: width of one head.
        cross: whether keys come from the text.
        level: how often the latent was halved before it reaches the layer; 0 for a transformer.
        count: how many such layers there are.
    """

    component: str
    heads: int
    head_dim: int
    cross: bool
    level: int
    count: int

    def tokens(self, latent_height: int, latent_width: int, patch_size: int = 1) -> int:
        """Return the number of query tokens for a latent of this size.

        >>> AttentionFacts(component="unet", heads=8, head_dim=80, cross=False, level=1, count=5).tokens(64, 64)
        1024
        """
        step = patch_size * 2**self.level
        # strided convolutions round up, so odd sizes do too
        rows, columns = -(-latent_height // step), -(-latent_width // step)
        return int(rows * columns)


@dataclass(frozen=True, kw_only=True)
class VAEFacts:
    """The autoencoder: what its decode costs and what it offers.

    Attributes:
        class_name: the autoencoder's class.
        block_out_channels: channels per level.
        latent_channels: channels of a latent.
        sample_size: pixels per side that it was made for; stock tiling starts above it.
        force_upcast: whether it decodes in float32 when its weights are float16 (SDXL).
        can_tile, can_slice: whether its class implements tiling and slicing.
        can_tile_exactly: whether it decodes in tiles that give the untiled picture.
        tiling, slicing: whether they are on already.
    """

    class_name: str
    block_out_channels: tuple[int, ...] = ()
    latent_channels: int = 4
    sample_size: int | None = None
    force_upcast: bool = False
    can_tile: bool = False
    can_tile_exactly: bool = False
    can_slice: bool = False
    tiling: bool = False
    slicing: bool = False


def read_denoiser_shape(module: Any) -> DenoiserShape:
    """Read a denoiser's shape from its config; what the config does not say keeps its default."""
    config = _config(module)
    blocks = _ints(config.get("block_out_channels"))
    sample_size = config.get("sample_size")
    if isinstance(sample_size, (list, tuple)):
        sample_size = max(sample_size)
    kind = "unet" if blocks else "transformer"
    cross_dims = _ints(config.get("cross_attention_dim") or config.get("joint_attention_dim"))
    head_dim, heads = config.get("attention_head_dim"), config.get("num_attention_heads")
    is_prompted = cross_dims != () or config.get("encoder_hid_dim") is not None or kind == "transformer"
    return DenoiserShape(
        kind=kind,
        class_name=type(module).__name__,
        sample_size=sample_size if isinstance(sample_size, int) else None,
        block_out_channels=blocks,
        attention_levels=tuple("Attn" in str(name) for name in config.get("down_block_types") or ()),
        layers_per_block=max(_ints(config.get("layers_per_block")), default=2),
        inner_dim=heads * head_dim if isinstance(heads, int) and isinstance(head_dim, int) else 0,
        layers=sum(_ints([config.get(key) or 0 for key in ("num_layers", "num_single_layers")])),
        patch_size=_patch_size(config) if kind == "transformer" else 1,
        cross_attention_dim=max(cross_dims, default=None),
        added_text_time=config.get("addition_embed_type") == "text_time",
        text_conditioned=is_prompted,
        distilled_guidance=bool(config.get("guidance_embeds") or config.get("time_cond_proj_dim")),
        extras=tuple(name for name in _EXTRAS if config.get(name)),
    )


def read_attention(component: str, module: Any) -> tuple[AttentionFacts, ...]:
    """Read the attention layers of a component, alike ones counted together."""
    counts: dict[tuple[int, int, bool, int], int] = {}
    levels = len(_ints(_config(module).get("block_out_channels")))
    for name, layer in module.named_modules():
        heads = getattr(layer, "heads", None)
        projection = getattr(layer, "to_q", None) or getattr(layer, "to_qkv", None)
        if not isinstance(heads, int) or projection is None:
            continue
        width: int = getattr(layer, "inner_dim", 0) or getattr(projection, "out_features", 0)
        key = (heads, width // heads, bool(getattr(layer, "is_cross_attention", False)), _level(name, levels))
        counts[key] = counts.get(key, 0) + 1
    return tuple(
        AttentionFacts(component=component, heads=heads, head_dim=head_dim, cross=cross, level=level, count=count)
        for (heads, head_dim, cross, level), count in sorted(counts.items())
    )


def read_vae(module: Any, *, upcasts: bool) -> VAEFacts:
    """Read an autoencoder's facts from its config and flags; `upcasts`: the pipeline heeds `force_upcast`."""
    config = _config(module)
    sample_size = config.get("sample_size")
    return VAEFacts(
        class_name=type(module).__name__,
        block_out_channels=_ints(config.get("block_out_channels") or config.get("decoder_block_out_channels")),
        latent_channels=config.get("latent_channels") or 4,
        sample_size=sample_size if isinstance(sample_size, int) else None,
        force_upcast=upcasts and bool(config.get("force_upcast", False)),
        # since diffusers 0.40 every autoencoder has the methods; the flag tells whether there is code behind them
        can_tile=hasattr(module, "use_tiling"),
        can_tile_exactly=decodes_in_exact_tiles(module),
        can_slice=hasattr(module, "use_slicing"),
        tiling=bool(getattr(module, "use_tiling", False)),
        slicing=bool(getattr(module, "use_slicing", False)),
    )


def _config(module: Any) -> Mapping[str, Any]:
    config = getattr(module, "config", None)
    return config if isinstance(config, Mapping) else {}


def _ints(value: Any) -> tuple[int, ...]:
    values = value if isinstance(value, (list, tuple)) else (value,)
    return tuple(item for item in values if isinstance(item, int) and not isinstance(item, bool))


def _patch_size(config: Mapping[str, Any]) -> int:
    patch = config.get("patch_size")
    if isinstance(patch, (list, tuple)):  # video models: (time, height, width)
        patch = patch[-1]
    # Flux packs 2x2 latents into one channel vector before the model and calls its patch size 1
    packed = config.get("in_channels") == 64 and patch == 1
    return 2 if packed else patch if isinstance(patch, int) else 1


def _level(name: str, levels: int) -> int:
    """Return how often the latent was halved on the way to a UNet's or decoder's layer of this name."""
    parts = name.split(".")
    if "mid_block" in parts:
        return 0 if parts[0] in ("encoder", "decoder") else max(0, levels - 1)
    for index, part in enumerate(parts[:-1]):
        if part == "down_blocks":
            return int(parts[index + 1])
        if part == "up_blocks":
            return max(0, levels - 1 - int(parts[index + 1]))
    return 0
