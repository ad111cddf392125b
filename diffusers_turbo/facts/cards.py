"""The catalog of known cards: what a plan must know of a machine one does not have. Data only, a source on each row.

Rates are dense (no structured sparsity), in FLOP/s, with fp32 accumulation where the maker gives both (that is what
torch asks for by default). 0.0 means: no such unit. `total_bytes` is what the driver leaves of the printed size where
a report of it was found (`memory_source`), and the printed size less 6 % elsewhere.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from ..errors import InvalidOptionError, explain_failure

_GIB = 2**30
_TERA = 1e12
_NOMINAL_SHARE = 0.94
_CUDA_GPUS = "https://developer.nvidia.com/cuda-gpus"
_CUDA_GPUS_LEGACY = "https://developer.nvidia.com/cuda-legacy-gpus"
_ADA = "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf"
_AMPERE = "https://www.nvidia.com/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.pdf"
_TURING = (
    "https://images.nvidia.com/aem-dam/en-zz/Solutions/design-visualization/technologies/turing-architecture/"
    "NVIDIA-Turing-Architecture-Whitepaper.pdf"
)
_BLACKWELL_RTX = (
    "https://images.nvidia.com/aem-dam/Solutions/geforce/blackwell/nvidia-rtx-blackwell-gpu-architecture.pdf"
)
_PASCAL = "https://images.nvidia.com/content/pdf/tesla/whitepaper/pascal-architecture-whitepaper.pdf"
_VOLTA = "https://images.nvidia.com/content/volta-architecture/pdf/volta-architecture-whitepaper.pdf"
_HOPPER = "https://resources.nvidia.com/en-us-tensor-core/gtc22-whitepaper-hopper"


@dataclass(frozen=True, kw_only=True)
class Card:
    """One known device: its level, memory and peak rates.

    `sm` is None and the rates are 0.0 where the device is no NVIDIA card. `no_kernels_since_cuda` is the first CUDA
    version whose torch builds hold no kernels for the card.
    """

    name: str
    device_type: str = "cuda"
    sm: tuple[int, int] | None = None
    total_bytes: int
    bandwidth_bytes_per_s: float = 0.0
    fp32_flops: float = 0.0
    fp16_flops: float = 0.0
    bf16_flops: float = 0.0
    tf32_flops: float = 0.0
    fp8_flops: float = 0.0
    multiprocessors: int = 0
    tensor_cores: bool = False
    fp16_gives_nan: bool = False
    no_kernels_since_cuda: tuple[int, int] | None = None
    aliases: tuple[str, ...] = ()
    source: str
    memory_source: str


def _nvidia(
    name: str,
    *,
    sm: tuple[int, int],
    memory_gib: float,
    reported_gib: float | None,
    bandwidth_gb_per_s: float,
    tflops: tuple[float, float, float, float, float],
    multiprocessors: int,
    source: str,
    memory_source: str = "",
    tensor_cores: bool = True,
    fp16_gives_nan: bool = False,
    aliases: tuple[str, ...] = (),
) -> Card:
    """Make a row; `tflops` is (fp32, fp16, bf16, tf32, fp8)."""
    fp32, fp16, bf16, tf32, fp8 = (rate * _TERA for rate in tflops)
    return Card(
        name=name,
        sm=sm,
        total_bytes=int((reported_gib if reported_gib is not None else memory_gib * _NOMINAL_SHARE) * _GIB),
        bandwidth_bytes_per_s=bandwidth_gb_per_s * 1e9,
        fp32_flops=fp32,
        fp16_flops=fp16,
        bf16_flops=bf16,
        tf32_flops=tf32,
        fp8_flops=fp8,
        multiprocessors=multiprocessors,
        tensor_cores=tensor_cores,
        fp16_gives_nan=fp16_gives_nan,
        # CUDA 13 dropped code generation below SM 7.5: https://docs.nvidia.com/cuda/cuda-toolkit-release-notes/
        no_kernels_since_cuda=(13, 0) if sm < (7, 5) else None,
        aliases=aliases,
        source=source,
        memory_source=memory_source or f"printed size {memory_gib:g} GiB less 6 %",
    )


CARDS: tuple[Card, ...] = (
    _nvidia(
        "Tesla P100",
        sm=(6, 0),
        memory_gib=16,
        reported_gib=None,
        bandwidth_gb_per_s=732,
        tflops=(9.3, 18.7, 0, 0, 0),
        multiprocessors=56,
        tensor_cores=False,
        source=_PASCAL,
        aliases=("P100", "P100-PCIE-16GB"),
    ),
    _nvidia(
        "Tesla V100",
        sm=(7, 0),
        memory_gib=16,
        reported_gib=None,
        bandwidth_gb_per_s=900,
        tflops=(15.7, 125, 0, 0, 0),
        multiprocessors=80,
        source=_VOLTA,
        aliases=("V100", "V100-SXM2-16GB"),
    ),
    _nvidia(
        "Tesla T4",
        sm=(7, 5),
        memory_gib=16,
        reported_gib=14.56,
        bandwidth_gb_per_s=320,
        tflops=(8.1, 65, 0, 0, 0),
        multiprocessors=40,
        source="https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/tesla-t4/t4-tensor-core-datasheet-951643.pdf",
        memory_source="https://github.com/Zheng-Chong/CatVTON/issues/133",
        aliases=("T4",),
    ),
    # SM 7.5 without tensor cores, and float16 gives NaN in Stable Diffusion (diffusers issue 9096)
    _nvidia(
        "GeForce GTX 1650",
        sm=(7, 5),
        memory_gib=4,
        reported_gib=None,
        bandwidth_gb_per_s=128,
        tflops=(3.0, 6.0, 0, 0, 0),
        multiprocessors=14,
        tensor_cores=False,
        fp16_gives_nan=True,
        source=_CUDA_GPUS,
        aliases=("GTX 1650", "1650"),
    ),
    _nvidia(
        "GeForce RTX 2060",
        sm=(7, 5),
        memory_gib=6,
        reported_gib=None,
        bandwidth_gb_per_s=336,
        tflops=(6.5, 25.8, 0, 0, 0),
        multiprocessors=30,
        source=_TURING,
        aliases=("RTX 2060", "2060"),
    ),
    _nvidia(
        "GeForce RTX 3060",
        sm=(8, 6),
        memory_gib=12,
        reported_gib=None,
        bandwidth_gb_per_s=360,
        tflops=(12.7, 25.5, 25.5, 12.7, 0),
        multiprocessors=28,
        source=_AMPERE,
        aliases=("RTX 3060", "3060", "RTX 3060 12GB"),
    ),
    _nvidia(
        "GeForce RTX 3090",
        sm=(8, 6),
        memory_gib=24,
        reported_gib=23.70,
        bandwidth_gb_per_s=936,
        tflops=(35.6, 71, 71, 35.6, 0),
        multiprocessors=82,
        source=_AMPERE,
        memory_source="https://github.com/Lightning-AI/lit-llama/issues/137",
        aliases=("RTX 3090", "3090"),
    ),
    _nvidia(
        "GeForce RTX 4090",
        sm=(8, 9),
        memory_gib=24,
        reported_gib=23.64,
        bandwidth_gb_per_s=1008,
        tflops=(82.6, 165.2, 165.2, 82.6, 330.3),
        multiprocessors=128,
        source=_ADA,
        memory_source="https://github.com/ali-vilab/VGen/issues/104",
        aliases=("RTX 4090", "4090"),
    ),
    _nvidia(
        "GeForce RTX 5090",
        sm=(12, 0),
        memory_gib=32,
        reported_gib=31.36,
        bandwidth_gb_per_s=1792,
        tflops=(104.8, 209.5, 209.5, 104.8, 419),
        multiprocessors=170,
        source=_BLACKWELL_RTX,
        memory_source="https://github.com/TrajectoryCrafter/TrajectoryCrafter/issues/20",
        aliases=("RTX 5090", "5090"),
    ),
    _nvidia(
        "A10",
        sm=(8, 6),
        memory_gib=24,
        reported_gib=None,
        bandwidth_gb_per_s=600,
        tflops=(31.2, 125, 125, 62.5, 0),
        multiprocessors=72,
        source="https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a10/pdf/a10-datasheet.pdf",
    ),
    # the plain name means the smaller of the two, so that a plan for "A100" runs on both
    _nvidia(
        "A100 40GB",
        sm=(8, 0),
        memory_gib=40,
        reported_gib=None,
        bandwidth_gb_per_s=1555,
        tflops=(19.5, 312, 312, 156, 0),
        multiprocessors=108,
        source="https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet.pdf",
        aliases=("A100", "A100-SXM4-40GB", "A100-PCIE-40GB"),
    ),
    _nvidia(
        "A100 80GB",
        sm=(8, 0),
        memory_gib=80,
        reported_gib=None,
        bandwidth_gb_per_s=1935,
        tflops=(19.5, 312, 312, 156, 0),
        multiprocessors=108,
        source="https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet.pdf",
        aliases=("A100-SXM4-80GB", "A100 80GB PCIe"),
    ),
    _nvidia(
        "L4",
        sm=(8, 9),
        memory_gib=24,
        reported_gib=None,
        bandwidth_gb_per_s=300,
        tflops=(30.3, 121, 121, 60, 242.5),
        multiprocessors=58,
        source="https://www.nvidia.com/en-us/data-center/l4/",
    ),
    _nvidia(
        "L40S",
        sm=(8, 9),
        memory_gib=48,
        reported_gib=None,
        bandwidth_gb_per_s=864,
        tflops=(91.6, 362, 362, 183, 733),
        multiprocessors=142,
        source="https://www.nvidia.com/en-us/data-center/l40s/",
    ),
    _nvidia(
        "H100",
        sm=(9, 0),
        memory_gib=80,
        reported_gib=85017493504 / _GIB,
        bandwidth_gb_per_s=3350,
        tflops=(67, 989, 989, 495, 1979),
        multiprocessors=132,
        source=_HOPPER,
        memory_source="measured: torch.cuda.mem_get_info() on an H100 80GB HBM3",
        aliases=("H100 80GB HBM3", "H100 SXM"),
    ),
    _nvidia(
        "H200",
        sm=(9, 0),
        memory_gib=141,
        reported_gib=None,
        bandwidth_gb_per_s=4800,
        tflops=(67, 989, 989, 495, 1979),
        multiprocessors=132,
        source="https://www.nvidia.com/en-us/data-center/h200/",
    ),
    _nvidia(
        "B200",
        sm=(10, 0),
        memory_gib=180,
        reported_gib=None,
        bandwidth_gb_per_s=7700,
        tflops=(75, 2250, 2250, 1100, 4500),
        multiprocessors=148,
        source="https://www.nvidia.com/en-us/data-center/hgx/",
    ),
    Card(
        name="CPU",
        device_type="cpu",
        total_bytes=16 * _GIB,
        source="an assumption: a desktop with 16 GiB",
        memory_source="an assumption: a desktop with 16 GiB",
    ),
    Card(
        name="MPS",
        device_type="mps",
        total_bytes=int(10.67 * _GIB),
        bandwidth_bytes_per_s=100e9,
        fp32_flops=2.6e12,
        fp16_flops=2.6e12,
        source="https://www.apple.com/newsroom/2020/11/apple-unleashes-m1/",
        memory_source="torch.mps.recommended_max_memory() is two thirds of a 16 GiB machine's memory",
        aliases=("M1",),
    ),
)


def _key(name: str) -> str:
    """Reduce a name to what people agree on: "NVIDIA GeForce RTX 3060", "rtx-3060" and "RTX3060" are one card."""
    words = re.sub(r"nvidia|geforce|tesla", "", name.lower())
    return re.sub(r"[^a-z0-9]", "", words)


_BY_KEY = {_key(alias): card for card in CARDS for alias in (card.name, *card.aliases)}


def find_card(name: str) -> Card:
    """Return the catalog's row for a card's name or alias.

    Raises:
        InvalidOptionError: no such card; the text names close matches.

    >>> find_card("rtx3060").sm
    (8, 6)
    """
    card = _BY_KEY.get(_key(str(name)))
    if card is None:
        known = {_key(row.name): row.name for row in CARDS}
        close = [known[key] for key in difflib.get_close_matches(_key(str(name)), known, n=3, cutoff=0.5)]
        raise InvalidOptionError(
            explain_failure(
                f"DeviceFacts.card({name!r})",
                "no card of this name in the catalog",
                f"one of {', '.join(row.name for row in CARDS)}",
                f"try {' or '.join(close)}" if close else "choose a card of the same SM level and memory",
            )
        )
    return card
