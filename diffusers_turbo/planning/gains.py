"""Measured figures that decisions rest on, each with its source. Data only.

Unless a row says otherwise: one H100 80GB, torch 2.11.0+cu130, diffusers 0.42.1, float16, batch 1, guidance 7.5,
full-size architectures with random weights; raw data in docs/benchmarks/.
"""

from __future__ import annotations

from dataclasses import dataclass

_H100 = "H100, torch 2.11, diffusers 0.42.1 (docs/benchmarks/)"


@dataclass(frozen=True, kw_only=True)
class CompileGain:
    """What torch.compile(default) of denoiser and VAE gains and costs for one family.

    `plain_ms` and `compiled_ms` are whole pictures, `first_image_s` the time to the first picture when compiling.
    """

    plain_ms: float
    compiled_ms: float
    first_image_s: float
    setting: str
    source: str

    @property
    def break_even_images(self) -> int:
        """How many pictures pay back the compile time.

        >>> COMPILE_GAINS["sd15"].break_even_images
        174
        """
        saved_s = (self.plain_ms - self.compiled_ms) / 1000
        return int(self.first_image_s / saved_s) + 1


COMPILE_GAINS: dict[str, CompileGain] = {
    # the faster of two days' plain times (1855 and 2791 ms), so that the gain is not overstated
    "sd15": CompileGain(
        plain_ms=1855, compiled_ms=1225, first_image_s=109, setting="SD1.5, 512x512, 50 steps", source=_H100
    ),
    # only parts were measured: a step went from 43.2 to 33 ms (30 of them) and the fp16 decode from 143 to 39.5 ms
    "sdxl": CompileGain(
        plain_ms=2180,
        compiled_ms=2180 - 30 * (43.2 - 33) - (143 - 39.5),
        first_image_s=164,
        setting="SDXL, 1024x1024, 30 steps",
        source=_H100,
    ),
}
# the same network as SD1.5 but for the text's width
COMPILE_GAINS["sd21"] = COMPILE_GAINS["sd15"]


@dataclass(frozen=True, kw_only=True)
class TierGain:
    """What the tiers give one family: milliseconds of a whole picture once steady, and seconds to the first one.

    `source` is the file of `plain_ms` and `instant_ms`, `compiled_source` that of the compiled tier and of both first
    images; None where the compiled tier was not measured.
    """

    plain_ms: int
    instant_ms: int
    steps: int
    setting: str
    source: str
    instant_first_s: float | None = None
    compiled_ms: int | None = None
    compiled_first_s: float | None = None
    compiled_source: str | None = None

    @property
    def break_even_images(self) -> int | None:
        """From how many pictures on the compiled tier is the sooner done, None when never or not known.

        >>> gain = TierGain(plain_ms=1800, instant_ms=340, compiled_ms=330, steps=50, setting="", source="",
        ...                 instant_first_s=1, compiled_first_s=60)
        >>> gain.break_even_images
        5901
        """
        if self.compiled_ms is None or self.instant_first_s is None or self.compiled_first_s is None:
            return None
        saved_s = (self.instant_ms - self.compiled_ms) / 1000
        return int((self.compiled_first_s - self.instant_first_s) / saved_s) + 1 if saved_s > 0 else None


TIER_GAINS: dict[str, TierGain] = {
    "sd15": TierGain(
        plain_ms=1683,
        instant_ms=302,
        steps=50,
        setting="SD1.5, 512x512, 50 steps, H100",
        source="docs/benchmarks/instant-h100/sd15/results.json",
        instant_first_s=1.18,
        compiled_ms=332,
        compiled_first_s=59.3,
        compiled_source="docs/benchmarks/tiers-sd15-h100.json",
    ),
    "sdxl": TierGain(
        plain_ms=2581,
        instant_ms=894,
        steps=30,
        setting="SDXL, 1024x1024, 30 steps, VAE in float16, H100",
        source="docs/benchmarks/instant-h100/sdxl-fp16-vae/results.json",
    ),
}
# the same network as SD1.5 but for the text's width
TIER_GAINS["sd21"] = TIER_GAINS["sd15"]

FLOAT32_TIER_GAINS: dict[str, TierGain] = {
    "sd15": TierGain(
        plain_ms=2484,
        instant_ms=1532,
        steps=50,
        setting="SD1.5 in float32, 512x512, 50 steps, H100",
        source="docs/benchmarks/float32-h100/results.json",
    ),
}
"""The same for a denoiser in float32, whose convolutions are in TF32, as PyTorch has them by default."""
FLOAT32_TIER_GAINS["sd21"] = FLOAT32_TIER_GAINS["sd15"]


def tier_gain(family: str, dtype: str) -> TierGain | None:
    """Return what the tiers give a family in a dtype, None where that was not measured.

    >>> tier_gain("sdxl", "bfloat16") == TIER_GAINS["sdxl"], tier_gain("sdxl", "float32")
    (True, None)
    """
    return (FLOAT32_TIER_GAINS if dtype == "float32" else TIER_GAINS).get(family)


@dataclass(frozen=True, kw_only=True)
class LayoutGain:
    """What channels-last does to one UNet step: `plain_ms` and `eager_ms`, and `compiled_ms` where it is compiled."""

    plain_ms: float
    eager_ms: float
    compiled_ms: float
    setting: str
    source: str


LAYOUT_GAINS: dict[str, LayoutGain] = {
    "sd15": LayoutGain(
        plain_ms=12.3, eager_ms=10.8, compiled_ms=6.6, setting="SD1.5 step at 512x512 as a CUDA graph", source=_H100
    ),
    "sdxl": LayoutGain(
        plain_ms=43.2, eager_ms=46, compiled_ms=33, setting="SDXL step at 1024x1024 as a CUDA graph", source=_H100
    ),
}
LAYOUT_GAINS["sd21"] = LAYOUT_GAINS["sd15"]

CPU_LAYOUT_SECONDS = (14.96, 14.84)
"""One SD1.5 step at 512x512 on two CPU cores, plain and channels-last. Source: docs/benchmarks/cpu-levers.json."""

CPU_TRACE_SECONDS = (1.953, 1.553)
"""A 20-step picture of the emoji model on two CPU cores, eager and traced. Source: docs/benchmarks/cpu-levers.json."""

CPU_TRACE_PARAMETERS = 11_470_000
"""Parameters of the UNet that was traced there. A trace saves the Python between the kernels, a share of the time that
shrinks as kernels grow, so nothing is promised above this size."""

NAIVE_STEP_MS, SDPA_STEP_MS = 18.95, 12.3
"""One SD1.5 step at 512x512 as a CUDA graph with naive attention and with SDPA. Source: H100, as above."""


@dataclass(frozen=True, kw_only=True)
class ProjectionGain:
    """What fused QKV does to a whole picture: milliseconds with separate and with fused projections."""

    separate_ms: int
    fused_ms: int
    setting: str
    source: str


FUSED_GAINS: dict[str, ProjectionGain] = {
    "sd15": ProjectionGain(
        separate_ms=2792, fused_ms=2715, setting="SD1.5, 512x512, 50 steps, eager, H100", source=_H100
    ),
    # the instant tier as it was, and its graphs, kernels and channels-last with fused projections
    "sdxl": ProjectionGain(
        separate_ms=1050,
        fused_ms=1035,
        setting="SDXL, 1024x1024, 30 steps, CUDA graphs, H100",
        source="docs/benchmarks/instant-sdxl-h100.json",
    ),
}
FUSED_GAINS["sd21"] = FUSED_GAINS["sd15"]

FP32_NAIVE_MS, FP16_NAIVE_MS = 3963, 2821
"""SD1.5 512x512, 50 steps, naive attention. Source: H100, as above."""

OFFLOAD_SECONDS: dict[str, float] = {
    "none": 0.17,
    "enable_model_cpu_offload": 0.94,
    "enable_group_offload": 0.71,
    "enable_sequential_cpu_offload": 2.04,
}
"""SD1.5 512x512, 3 steps and decode, by offload (group: leaf level with a stream). Source: H100, as above."""

OFFLOAD_STEPS = 3
OFFLOAD_DENOISER_BYTES = 859_520_964 * 2
OFFLOAD_BYTES = OFFLOAD_DENOISER_BYTES + 83_653_863 * 2
"""What was offloaded there: UNet and VAE in float16, without a text encoder."""

INSTANT_BATCH_SECONDS: dict[int, float] = {1: 0.300, 2: 0.464, 4: 0.851}
"""Pictures in a call -> seconds of 50 steps of SD1.5 at 512x512, instant tier. Source: docs/benchmarks/tiers-h100/."""

EXACT_TILES_SECONDS: dict[str, dict[tuple[int, str], float]] = {
    "float32": {(256, "device"): 0.109, (256, "host"): 0.256, (128, "host"): 0.555},
    "float16": {(256, "device"): 0.099, (256, "host"): 0.160, (128, "host"): 0.464},
}
"""What exact tiles add to the decode of `DECODE_PIXELS`, by their size and where pictures are held, beside the decode
with fused kernels. Source: docs/benchmarks/decodes-h100.json."""

DECODE_PIXELS = 1024**2

COPY_RATES: dict[str, float] = {"page-locked": 48.6e9, "ordinary": 5.8e9}
"""Bytes a second from host memory of each kind to the device. Source: docs/decisions/partial-residency.md."""

SDXL_OFFLOAD_SECONDS = {"none": 0.69, "enable_model_cpu_offload": 2.7, "enable_sequential_cpu_offload": 6.5}
"""SDXL 1024x1024, 3 steps and tiled decode, without text encoders: what predicted times are held against. As above."""

TILING_SECONDS = (1.4, 2.0)
"""SD1.5 2048x2048, 3 steps and decode, without and with VAE tiling. Source: H100, as above."""
