"""One frozen value per action: what each switch accepts, checked when the value is made.

Every class names the pipeline method it stands for (`action`), the concern it belongs to (`slot`), and whether its
pictures are those of the plain pipeline up to rounding (`exact`; if not, `lossy_reason` says what changes).
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields
from typing import Any

from ..errors import InvalidOptionError, explain_failure
from .base import Options as Options
from .base import is_int

SDPA_BACKENDS = ("auto", "flash", "efficient", "cudnn", "math")
COMPILE_MODES = (None, "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
OFFLOAD_TYPES = ("block_level", "leaf_level")
HALF_DTYPES = ("float16", "bfloat16")
SYNC_FREE_SCHEDULERS = (
    *("DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"),
    *("DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "LCMScheduler", "FlowMatchEulerDiscreteScheduler"),
)
"""Schedulers for which the package has a loop without waiting (`schedulers/registry.py`)."""

_DTYPE_ALIASES = {
    "fp16": "float16",
    "half": "float16",
    "bf16": "bfloat16",
    "fp32": "float32",
    "float": "float32",
    "full": "float32",
}


def dtype_name(value: object) -> str:
    """Name a dtype as torch does, without torch: "fp16", "torch.float16" and torch.float16 are all "float16".

    >>> dtype_name("bf16")
    'bfloat16'
    """
    name = str(value).removeprefix("torch.")
    return _DTYPE_ALIASES.get(name, name)


@dataclass(frozen=True, kw_only=True)
class NaiveAttention(Options):
    """The reference attention, which materialises the whole score matrix."""

    action = "enable_naive_attention"
    slot = "attention"


@dataclass(frozen=True, kw_only=True)
class SDPAAttention(Options):
    """torch's scaled_dot_product_attention, with one of its backends or its own choice ("auto")."""

    action = "enable_sdpa"
    slot = "attention"

    backend: str = "auto"

    def __post_init__(self) -> None:
        self._check_choice("backend", SDPA_BACKENDS)


@dataclass(frozen=True, kw_only=True)
class XFormersAttention(Options):
    """xFormers' memory-efficient attention; `attention_op` as in diffusers, None leaves the choice to xFormers."""

    action = "enable_xformers_memory_efficient_attention"
    slot = "attention"

    attention_op: Any = None


@dataclass(frozen=True, kw_only=True)
class SlicedAttention(Options):
    """Attention in slices over batch x heads, then over query rows.

    `slice_size` is "auto" (half of the heads at a time), "max" (one head at a time) or how many heads at a time;
    `max_bytes` bounds what scores, softmax and upcast copies may take beyond q, k, v and the output.
    """

    action = "enable_attention_slicing"
    slot = "attention"

    slice_size: str | int | None = "auto"
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        size = self.slice_size
        if size not in ("auto", "max", None) and not (is_int(size) and isinstance(size, int) and size > 0):
            raise self._refuse("slice_size", '"auto", "max" or a positive number of heads', 'use "auto"')
        self._check_positive("max_bytes")


@dataclass(frozen=True, kw_only=True)
class ChannelsLast(Options):
    """Keep the convolutions' weights and activations in the channels-last layout."""

    action = "enable_channels_last"
    slot = "layout"


@dataclass(frozen=True, kw_only=True)
class TF32(Options):
    """Let fp32 convolutions and matrix products run on TF32 tensor cores during this pipe's calls. LOSSY."""

    action = "enable_tf32"
    slot = "tf32"
    exact = False
    lossy_reason = "TF32 keeps 10 bits of each factor's mantissa, fp32 keeps 23"


@dataclass(frozen=True, kw_only=True)
class HalfPrecision(Options):
    """Cast the weights to a 16-bit dtype; None takes the dtype the model was made for. LOSSY."""

    action = "enable_half_precision"
    slot = "precision"
    exact = False
    lossy_reason = "16-bit weights and activations round every value (float16 keeps 10 bits, bfloat16 7)"

    dtype: str | None = None

    def __post_init__(self) -> None:
        if self.dtype is not None:
            object.__setattr__(self, "dtype", dtype_name(self.dtype))
        self._check_choice("dtype", (*HALF_DTYPES, None))


@dataclass(frozen=True, kw_only=True)
class FusedQKV(Options):
    """Compute the three projections of attention as one matrix product."""

    action = "fuse_qkv_projections"
    slot = "projections"

    unet: bool = True
    vae: bool = True

    def __post_init__(self) -> None:
        self._check_flags("unet", "vae")
        if not (self.unet or self.vae):
            raise self._refuse("unet", "the denoiser, the VAE or both", "set unet=True or vae=True")


@dataclass(frozen=True, kw_only=True)
class VAESlicing(Options):
    """Decode the pictures of a batch one after the other."""

    action = "enable_vae_slicing"
    slot = "vae_slicing"


@dataclass(frozen=True, kw_only=True)
class VAETiling(Options):
    """Decode each picture in overlapping tiles. LOSSY: every tile is normalised by its own statistics.

    `tile_size` in pixels of the picture's side; `overlap` as a fraction of the tile.
    """

    action = "enable_vae_tiling"
    slot = "vae_tiling"
    exact = False
    lossy_reason = "each tile's group norms see only the tile, and borders are blended"

    tile_size: int | None = None
    overlap: float | None = None

    def __post_init__(self) -> None:
        # 8 pixels per latent is the smallest step of every KL autoencoder diffusers ships for images.
        self._check_positive("tile_size", multiple_of=8)
        if self.overlap is not None and not (
            isinstance(self.overlap, (int, float)) and not isinstance(self.overlap, bool) and 0 <= self.overlap <= 0.5
        ):
            # beyond one half a tile reaches over its neighbour, and the blend only knows neighbours
            raise self._refuse("overlap", "a fraction from 0 to 0.5 of the tile", "use 0.25, or leave overlap out")


@dataclass(frozen=True, kw_only=True)
class ModelOffload(Options):
    """Keep one whole component on the device at a time, the others in host memory."""

    action = "enable_model_cpu_offload"
    slot = "offload"

    gpu_id: int | None = None
    device: Any = None

    def __post_init__(self) -> None:
        _check_gpu_id(self, self.gpu_id)


@dataclass(frozen=True, kw_only=True)
class SequentialOffload(Options):
    """Keep one layer's weights on the device at a time: the least memory, and the slowest."""

    action = "enable_sequential_cpu_offload"
    slot = "offload"

    gpu_id: int | None = None
    device: Any = None

    def __post_init__(self) -> None:
        _check_gpu_id(self, self.gpu_id)


def _check_gpu_id(options: Options, gpu_id: int | None) -> None:
    if gpu_id is not None and (not is_int(gpu_id) or gpu_id < 0):
        raise options._refuse("gpu_id", "a device number from 0 on", "leave gpu_id out to use the current device")


@dataclass(frozen=True, kw_only=True)
class GroupOffload(Options):
    """Keep groups of layers on the device, the rest in host memory (or on disk), with prefetch on a stream."""

    action = "enable_group_offload"
    slot = "offload"

    onload_device: Any = None
    offload_device: Any = "cpu"
    offload_type: str = "block_level"
    num_blocks_per_group: int | None = None
    non_blocking: bool = False
    use_stream: bool = False
    record_stream: bool = False
    low_cpu_mem_usage: bool = False
    offload_to_disk_path: str | None = None
    exclude_modules: str | tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.exclude_modules, list):
            object.__setattr__(self, "exclude_modules", tuple(self.exclude_modules))
        self._check_choice("offload_type", OFFLOAD_TYPES)
        self._check_flags("non_blocking", "use_stream", "record_stream", "low_cpu_mem_usage")
        self._check_positive("num_blocks_per_group")
        if self.offload_type == "leaf_level" and self.num_blocks_per_group is not None:
            raise self._refuse("num_blocks_per_group", 'offload_type="block_level"', "leave num_blocks_per_group out")
        if self.use_stream and self.num_blocks_per_group not in (None, 1):
            raise self._refuse("num_blocks_per_group", "1 with use_stream=True", "set it to 1, or use_stream=False")
        if self.record_stream and not self.use_stream:
            raise self._refuse("record_stream", "use_stream=True", "set use_stream=True, or leave record_stream out")


@dataclass(frozen=True, kw_only=True)
class SyncFreeLoop(Options):
    """Step the scheduler with timesteps from host memory, so that the host never waits for the GPU in the loop."""

    action = "enable_sync_free_loop"
    slot = "scheduler"


@dataclass(frozen=True, kw_only=True)
class _Compile(Options):
    slot = "compile"

    mode: str | None = None
    fullgraph: bool = False
    dynamic: bool | None = None
    regional: bool = False
    backend: str = "inductor"

    def __post_init__(self) -> None:
        self._check_choice("mode", COMPILE_MODES)
        self._check_choice("dynamic", (None, True, False))
        self._check_flags("fullgraph", "regional")
        if not isinstance(self.backend, str) or not self.backend:
            raise self._refuse("backend", "the name of a torch.compile backend", 'use "inductor"')
        if self.mode not in (None, "default") and self.backend != "inductor":
            # the other backends of torch take no mode and fail only at the first call, minutes later
            raise self._refuse("mode", 'backend="inductor"', "leave mode out, or leave backend at its default")


@dataclass(frozen=True, kw_only=True)
class CompileUNet(_Compile):
    """Compile the UNet in place with torch.compile."""

    action = "compile_unet"


@dataclass(frozen=True, kw_only=True)
class CompileTransformer(_Compile):
    """Compile the transformer in place with torch.compile."""

    action = "compile_transformer"


@dataclass(frozen=True, kw_only=True)
class CompileVAE(_Compile):
    """Compile the VAE's decoder in place with torch.compile."""

    action = "compile_vae"


@dataclass(frozen=True, kw_only=True)
class TraceUNet(Options):
    """Run the UNet through torch.jit.trace.

    `height`, `width` (pixels) and `batch_size` are those of the traced example; `check` compares at a size and batch
    that were not traced; `save_path` writes the trace, `load_path` reads one instead of tracing.
    """

    action = "trace_unet"
    slot = "trace"

    height: int | None = None
    width: int | None = None
    batch_size: int = 1
    check: bool = True
    save_path: str | None = None
    load_path: str | None = None

    def __post_init__(self) -> None:
        self._check_positive("height", multiple_of=8)
        self._check_positive("width", multiple_of=8)
        self._check_positive("batch_size")
        self._check_flags("check")
        if self.save_path is not None and self.load_path is not None:
            raise self._refuse("load_path", "save_path or load_path, not both", "leave one of the two out")


@dataclass(frozen=True, kw_only=True)
class CUDAGraphs(Options):
    """Capture each component's calls as CUDA graphs; `max_graphs` are kept for each, the least recently used goes."""

    action = "enable_cuda_graphs"
    slot = "graphs"

    max_graphs: int = 8

    def __post_init__(self) -> None:
        if self.max_graphs is None:
            raise self._refuse("max_graphs", "a positive integer", "leave max_graphs out for 8")
        self._check_positive("max_graphs")


ACTIONS: dict[str, type[Options]] = {
    cls.action: cls
    for cls in (
        HalfPrecision,
        ChannelsLast,
        FusedQKV,
        NaiveAttention,
        SDPAAttention,
        XFormersAttention,
        SlicedAttention,
        TF32,
        VAESlicing,
        VAETiling,
        ModelOffload,
        GroupOffload,
        SequentialOffload,
        SyncFreeLoop,
        CompileUNet,
        CompileTransformer,
        CompileVAE,
        TraceUNet,
        CUDAGraphs,
    )
}
"""Every action by its method's name, in the order in which slots are applied."""


def make_options(action: str, **arguments: Any) -> Options:
    """Make the options of an action from its method's name and arguments.

    Raises:
        InvalidOptionError: no such action, no such argument, or a value outside what the action accepts.

    >>> make_options("enable_sdpa", backend="flash")
    SDPAAttention(backend='flash')
    """
    if action not in ACTIONS:
        close = difflib.get_close_matches(action, ACTIONS, n=3) or list(ACTIONS)
        raise InvalidOptionError(
            explain_failure(f"{action}()", "no action of this name", f"one of {', '.join(close)}", "correct the name")
        )
    cls = ACTIONS[action]
    names = [field.name for field in fields(cls)]
    if unknown := [name for name in arguments if name not in names]:
        raise InvalidOptionError(
            explain_failure(
                f"{action}({', '.join(unknown)}=...)",
                f"no argument {', '.join(unknown)}",
                f"arguments among {', '.join(names)}" if names else "no arguments",
                "correct the name or leave it out",
            )
        )
    return cls(**arguments)
