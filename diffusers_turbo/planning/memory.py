"""An ESTIMATE of the peak device memory of each stage: encoding the prompt, denoising, decoding.

The model is weights on the device + live activations + workspaces. Activations are counted in units of one tensor at
each level of the network; the counts come from running full-size SD1.5, SD2.1, SDXL, SD3, Flux and PixArt on the meta
device and adding up live storages. Workspaces are fitted to peaks measured with torch 2.11 on an H100 (batch 1 to 8,
512 to 2048 pixels, each offload). Over those 38 rows it is at most 2 % too low and, but for eight pictures decoded at
once (13 %), at most 8 % too high, which `tests/planning/test_memory.py` holds. Text encoders, ControlNets and
transformers were not measured. It speaks of allocated bytes: what the allocator reserves was up to 1.7 times
that in the same runs, but is given back before an allocation fails. Of CUDA graphs it counts what they keep, of
compiled code nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from .estimate import MemoryEstimate, StageMemory
from .options import (
    ChannelsLast,
    CUDAGraphs,
    DenoiserSlicing,
    GroupOffload,
    HalfPrecision,
    ModelOffload,
    NaiveAttention,
    Options,
    PartialOffload,
    SDPAAttention,
    SequentialOffload,
    SlicedAttention,
    VAEExactTiling,
    VAESlicing,
    VAETiling,
    XFormersAttention,
)
from .units import MIB

if TYPE_CHECKING:
    from ..facts.components import ComponentFacts
    from ..facts.pipeline import PipelineFacts

# Beside weights and activations: cuBLAS workspaces (32 MiB on Hopper, less elsewhere), latents, prompt embeddings.
# Measured: SD1.5 weighs 1799 MiB and holds 1854 between stages.
FIXED_BYTES = 55 * MIB

# Live tensors at the peak of a transformer block, in tensors of [tokens, channels]: the GEGLU's projection (8), gate
# (4) and product (4), norms and residuals. Meta-device runs: 24.0 for SD1.5, SD2.1 and SDXL at their widest level.
_UNET_BLOCK_TENSORS = 24
# The same for transformers' blocks: 12.1 PixArt, 12.5 SD3, 17.6 Flux (its single blocks hold the MLP beside q, k, v).
_TRANSFORMER_BLOCK_TENSORS = 17.6
# Prompt tokens beside the picture's: 512 for Flux and 333 for SD3, by their pipelines' defaults.
_PROMPT_TOKENS = 512
# A resnet's input, its norm and its SiLU live together, and going up the input is concatenated with a skip.
_RESNET_TENSORS = 3
# Naive attention holds scores and softmax; what else is live then is 0.43 of the fused peak (2936 and 18458 MiB
# measured for SD1.5 at 512 and 1024).
_SCORE_COPIES = 2
_NAIVE_SHARE = 0.43
# A decoder's resnet at its widest level holds input, norm and SiLU: 384 MiB at 512 and 1536 at 1024 on meta.
_DECODER_TENSORS = 3
# Before the blocks that raise the resolution, its attention holds the picture, queries, keys, values and results.
_MIDDLE_TENSORS = 8
# cuDNN's workspace, as a share of the decoder's live tensors: measured 0.585 in NCHW for one, two and four pictures at
# 512 to 2048 (0.335 for eight, which is not relied upon), and 0.335 in channels-last.
_NCHW_WORKSPACE = 0.585
_CHANNELS_LAST_WORKSPACE = 0.335
# A CLIP or T5 encoder's activations are small beside its weights; an allowance for 512 tokens.
_ENCODE_BYTES = 64 * MIB
# The KL autoencoder of every Stable Diffusion, for autoencoders whose config says nothing.
_DEFAULT_DECODER = (128, 256, 512, 512)

ENCODER_ROLES = ("text_encoder", "image_encoder")
"""Roles of the components that are called before the loop."""

LOOPED_ROLES = ("denoiser", "controlnet")
"""Roles of the components that are called at every step."""


def looped_names(facts: PipelineFacts) -> tuple[str, ...]:
    """Return the components that are called at every step, the denoiser last."""
    names = [part.name for part in facts.components if part.role in LOOPED_ROLES]
    return tuple(sorted(names, key=lambda name: name == facts.denoiser))


_NAIVE_PROCESSORS = ("AttnProcessor", "AttnAddedKVProcessor", "CustomDiffusionAttnProcessor", "NaiveAttnProcessor")
_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}


def estimate_memory(
    pipeline_facts: PipelineFacts,
    height: int,
    width: int,
    batch_size: int = 1,
    options: Sequence[Options] = (),
) -> MemoryEstimate:
    """Estimate the peak device memory of each stage.

    Args:
        pipeline_facts: the pipeline as it stands; what it has on already (VAE tiling, processors) is counted.
        height, width: pixels.
        batch_size: pictures per call.
        options: switches assumed on beside what the pipeline has.
    """
    switches = {type(option): option for option in options}
    stages = (
        _encode(pipeline_facts, switches),
        _denoise(pipeline_facts, switches, height, width, batch_size),
        _decode(pipeline_facts, switches, height, width, batch_size),
    )
    return MemoryEstimate(stages=_with_graphs(stages, switches) if CUDAGraphs in switches else stages)


def _with_graphs(stages: tuple[StageMemory, ...], switches: Switches) -> tuple[StageMemory, ...]:
    """Let each stage hold what the others were recorded in: a graph's memory stays its own between calls.

    Beside partial offload there are graphs of the denoiser only, and they leave when it does.
    """
    offload = switches.get(PartialOffload)
    kept = [stage.stage for stage in stages]
    if isinstance(offload, PartialOffload):
        kept = [] if offload.denoiser_leaves else ["denoise"]
    held = [
        stage.activation_bytes + stage.workspace_bytes - FIXED_BYTES if stage.stage in kept else 0 for stage in stages
    ]
    return tuple(
        replace(stage, activation_bytes=stage.activation_bytes + sum(held) - own)
        for stage, own in zip(stages, held, strict=True)
    )


Switches = Mapping[type[Options], Options]


def _encode(facts: PipelineFacts, switches: Switches) -> StageMemory:
    return StageMemory(
        stage="encode",
        weights_bytes=_weights(facts, switches, ENCODER_ROLES),
        activation_bytes=_ENCODE_BYTES if any(part.role == "text_encoder" for part in facts.components) else 0,
        workspace_bytes=FIXED_BYTES,
    )


def _denoise(facts: PipelineFacts, switches: Switches, height: int, width: int, batch_size: int) -> StageMemory:
    rows, columns = -(-height // facts.vae_scale_factor), -(-width // facts.vae_scale_factor)
    item_bytes = _item_bytes(facts.denoiser_facts, facts, switches)
    samples = samples_at_once(facts, batch_size, switches.values())
    live = int(_live_values(facts, rows * columns) * samples * item_bytes)
    scores = max(
        (
            layer.heads * layer.tokens(rows, columns, facts.shape.patch_size) ** 2 * item_bytes * _SCORE_COPIES
            for layer in facts.attention
            if layer.component == facts.denoiser and not layer.cross
        ),
        default=0,
    )
    held = _scores_held(facts, switches, scores, samples)
    return StageMemory(
        stage="denoise",
        weights_bytes=_weights(facts, switches, ("denoiser", "controlnet")),
        activation_bytes=max(live, held + int(_NAIVE_SHARE * live)) if held else live,
        workspace_bytes=FIXED_BYTES,
    )


def samples_at_once(facts: PipelineFacts, batch_size: int, options: Iterable[Options] = ()) -> int:
    """Return how many samples the denoiser works on in one of its calls, for so many pictures."""
    slices = [option.slice_size for option in options if isinstance(option, DenoiserSlicing)]
    return min([batch_size * facts.guidance_copies, *slices])


def _scores_held(facts: PipelineFacts, switches: Switches, scores_per_sample: int, samples: int) -> int:
    """Return the bytes of scores and softmax that attention holds at once; 0 where its kernel never holds them."""
    sliced = switches.get(SlicedAttention)
    if isinstance(sliced, SlicedAttention):
        heads = max((layer.heads for layer in facts.attention if layer.component == facts.denoiser), default=1)
        held = scores_per_sample // heads * min(_heads_at_once(sliced, heads), heads * samples)
        return min(held, sliced.max_bytes) if sliced.max_bytes is not None else held
    fused = switches.get(SDPAAttention)
    if isinstance(fused, SDPAAttention):
        naive = fused.backend == "math"
    else:
        naive = XFormersAttention not in switches and (NaiveAttention in switches or holds_scores(facts.processors))
    return scores_per_sample * samples if naive else 0


def _heads_at_once(sliced: SlicedAttention, heads: int) -> int:
    if isinstance(sliced.slice_size, int):
        return sliced.slice_size
    return 1 if sliced.slice_size == "max" else max(1, heads // 2)


def holds_scores(processors: Mapping[str, int]) -> bool:
    """True where one of these attention processors materialises the score matrix.

    >>> holds_scores({"AttnProcessor2_0": 32})
    False
    """
    return any(name in _NAIVE_PROCESSORS for name in processors)


def _live_values(facts: PipelineFacts, latents: int) -> float:
    """Return the values alive at the denoiser's peak for one sample with fused attention."""
    shape = facts.shape
    if shape.kind == "transformer":
        tokens = latents / shape.patch_size**2 + _PROMPT_TOKENS
        return _TRANSFORMER_BLOCK_TENSORS * tokens * shape.inner_dim
    peak, skips = 0.0, 0.0
    channels = shape.block_out_channels
    for level, width in enumerate(channels):
        area = latents / 4**level
        below = channels[min(level + 1, len(channels) - 1)]
        # going up: the level below's output, concatenated with a skip, then through a resnet
        resnet = skips + area * (below + _RESNET_TENSORS * (below + width))
        if level == 0:
            skips = area * width
        # going down: the last block of the level, with every earlier output kept for the way up
        block = skips + area * width * (shape.layers_per_block - 1 + _UNET_BLOCK_TENSORS)
        has_attention = level < len(shape.attention_levels) and shape.attention_levels[level]
        peak = max(peak, resnet, block if has_attention else 0.0)
        skips += area * width * (shape.layers_per_block + 0.25)
    return peak


def _decode(facts: PipelineFacts, switches: Switches, height: int, width: int, batch_size: int) -> StageMemory:
    part = facts.component("vae")
    if facts.vae is None or part is None:
        weights = _weights(facts, switches, ())
        return StageMemory(stage="decode", weights_bytes=weights, activation_bytes=0, workspace_bytes=FIXED_BYTES)
    item_bytes = _item_bytes(part, facts, switches)
    weights = _weights(facts, switches, ("vae", "other"))
    if facts.vae.force_upcast and item_bytes == 2:
        # decoding casts the whole VAE to float32 first; offloaded, it is the VAE alone that grows
        if isinstance(offload_in_force(facts, switches), (ModelOffload, PartialOffload, type(None))):
            weights += part.parameter_bytes * 2 // _stored_item_bytes(part)
        item_bytes = 4
    at_once = 1 if VAESlicing in switches or facts.vae.slicing else batch_size
    area = height * width
    pictures = 0
    if tile := _tile_size(facts, switches):
        area = min(area, tile**2)
        if VAETiling in switches and facts.vae.class_name == "AutoencoderKL":
            # our own tiles, picture after picture: the canvas, one row of tiles in float32, and the row after it
            at_once = 1
            pictures = 3 * (height * width * item_bytes + 2 * min(tile, height) * width * 4)
        else:
            # rows of finished tiles, the blended rows, and the picture they are joined into
            pictures = 3 * 3 * height * width * item_bytes * at_once
    channels = decoder_channels(facts)
    widest = max(area / 4**level * channels[min(level + 1, len(channels) - 1)] for level in range(len(channels)))
    middle = 0
    if isinstance(exact := switches.get(VAEExactTiling), VAEExactTiling) and max(height, width) > exact.tile_size:
        at_once = 1
        # the pictures before and after the last layers, and a tile of these; or a tile where an upsampling widens it
        level = 0 if exact.hold_on == "device" else min(1, len(channels) - 1)
        pictures = held_pictures(facts, height, width, item_bytes) if exact.hold_on == "device" else 0
        widest = min(widest, channels[level] * exact.tile_size**2)
        middle = _MIDDLE_TENSORS * channels[-1] * height * width // 4 ** (len(channels) - 1) * item_bytes
    live = int(_DECODER_TENSORS * widest * at_once * item_bytes)
    pictures += max(0, middle - live - pictures)
    if at_once < batch_size:
        pictures += 3 * height * width * item_bytes * batch_size
    share = _CHANNELS_LAST_WORKSPACE if ChannelsLast in switches else _NCHW_WORKSPACE
    return StageMemory(
        stage="decode",
        weights_bytes=weights,
        activation_bytes=live + pictures,
        workspace_bytes=int(live * share) + FIXED_BYTES,
    )


def decoder_channels(facts: PipelineFacts) -> tuple[int, ...]:
    """Return the channels of the VAE's decoder, of the picture's own resolution first."""
    return (facts.vae.block_out_channels if facts.vae is not None else ()) or _DEFAULT_DECODER


def held_pictures(facts: PipelineFacts, height: int, width: int, item_bytes: int) -> int:
    """Return the bytes of the largest pictures that exact tiles hold whole: before and after a layer."""
    return 2 * decoder_channels(facts)[0] * height * width * item_bytes


def works_in_float32(facts: PipelineFacts) -> bool:
    """Whether the VAE does, as its weights are or because it is cast."""
    part = facts.component("vae")
    if part is None or facts.vae is None:
        return False
    return part.dtype == "float32" or (facts.vae.force_upcast and part.dtype == "float16")


def _tile_size(facts: PipelineFacts, switches: Switches) -> int | None:
    """Return the side of a tile in pixels, None where the picture is decoded whole."""
    tiling = switches.get(VAETiling)
    stock = (facts.vae.sample_size if facts.vae else None) or 512
    if isinstance(tiling, VAETiling):
        return tiling.tile_size or stock
    return stock if facts.vae is not None and facts.vae.tiling else None


def _weights(facts: PipelineFacts, switches: Switches, roles: tuple[str, ...]) -> int:
    """Return the bytes of weights on the device while components of these roles run, one after the other."""
    offload = offload_in_force(facts, switches)
    if offload is None:
        return sum(_scaled(part, part.parameter_bytes, facts, switches) for part in facts.components)
    if isinstance(offload, PartialOffload):
        return _partly(facts, switches, roles, offload)
    working = [part for part in facts.components if part.role in roles]
    held = [_scaled(part, _onloaded_bytes(part, offload), facts, switches) for part in working]
    return max(held, default=0)


def _partly(facts: PipelineFacts, switches: Switches, roles: tuple[str, ...], offload: PartialOffload) -> int:
    looped = [part for part in facts.components if part.role in LOOPED_ROLES]
    whole = sum(_scaled(part, part.parameter_bytes, facts, switches) for part in looped)
    resident_bytes = offload.stays(whole)
    if "denoiser" in roles:
        leaf = max((_scaled(part, part.largest_leaf_bytes, facts, switches) for part in looped), default=0)
        return min(whole, resident_bytes + offload.window * leaf)
    working = [part for part in facts.components if part.role in roles]
    held = max((_scaled(part, _visiting_bytes(part, offload), facts, switches) for part in working), default=0)
    return held + (0 if offload.denoiser_leaves else resident_bytes)


def _visiting_bytes(part: ComponentFacts, offload: PartialOffload) -> int:
    return part.largest_leaf_bytes if part.name in offload.alone else part.parameter_bytes


def offload_in_force(facts: PipelineFacts, switches: Switches) -> Options | None:
    """Return the offload in force: the switch's, else the one whose hooks are on the pipeline already."""
    for kind in (SequentialOffload, GroupOffload, PartialOffload, ModelOffload):
        if kind in switches:
            return switches[kind]
    if "accelerate:AlignDevicesHook" in facts.hooks:
        return SequentialOffload()
    if "diffusers:group_offloading" in facts.hooks:
        return GroupOffload(num_blocks_per_group=1)
    return ModelOffload() if "accelerate:CpuOffload" in facts.hooks else None


def _onloaded_bytes(part: ComponentFacts, offload: Options) -> int:
    if isinstance(offload, SequentialOffload):
        return part.largest_leaf_bytes
    return _group_bytes(part, offload) if isinstance(offload, GroupOffload) else part.parameter_bytes


def _group_bytes(part: ComponentFacts, group: GroupOffload) -> int:
    if group.offload_type == "leaf_level":
        # with a stream the next layer is fetched while this one works
        return part.largest_leaf_bytes * (2 if group.use_stream else 1)
    # a stream works with single blocks, and fetches the next while one works
    together = 2 if group.use_stream else group.num_blocks_per_group or 1
    windows = [
        sum(sizes[start : start + together])
        for sizes in part.block_bytes
        for start in range(0, len(sizes), 1 if group.use_stream else together)
    ]
    return max(windows, default=0) + part.rest_bytes


def _scaled(part: ComponentFacts, size_bytes: int, facts: PipelineFacts, switches: Switches) -> int:
    """Return what `size_bytes` of the component's weights are after a cast that the switches ask for."""
    return size_bytes * _item_bytes(part, facts, switches) // _stored_item_bytes(part)


def _stored_item_bytes(part: ComponentFacts) -> int:
    return _ITEM_BYTES.get(part.dtype, 2)


def _item_bytes(part: ComponentFacts, facts: PipelineFacts, switches: Switches) -> int:
    half = switches.get(HalfPrecision)
    if isinstance(half, HalfPrecision) and part.dtype in _ITEM_BYTES:
        return _ITEM_BYTES[half.dtype or facts.native_dtype]
    return _stored_item_bytes(part)
