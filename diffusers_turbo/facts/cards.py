"""The catalog of known cards: what a plan must know of a machine one does not have. Data only, a source on each row.

Rates are dense (no structured sparsity), in FLOP/s, with fp32 accumulation where the maker gives both (that is what
torch asks for by default). 0.0 means: no such unit, or no source. Rates named in `derived` are stated by no page that
was read; they follow from one that is, by these rules, which the rows that do state all of them obey:

- a GeForce with tensor cores accumulates in fp32 at half its fp16-accumulating rate, which is a quarter of the sparse
  rate on the box (https://github.com/cloudrift-ai/emmy/pull/339, Turing: tensorflow/tensorflow issue 24531);
- bf16 goes at the fp16 rate, tf32 at half and fp8 at twice of it; without tensor cores fp16 goes at twice fp32.

SM levels: developer.nvidia.com/cuda-gpus and cuda-legacy-gpus; the GTX 1650's and the RTX 2060's are on their rows.
SM counts: stated with the rates, or the CUDA cores stated there over 64 (up to SM 8.0) or 128 an SM.
`total_bytes` is what the driver leaves of the printed size where a report of it was found (`memory_source`: Linux;
other reports differ by up to 0.2 GiB), and the printed size less 6 % elsewhere. Of each link an excerpt was read, in a
stored copy and not live.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from ..errors import InvalidOptionError, explain_failure

_GIB = 2**30
_TERA = 1e12
_NOMINAL_SHARE = 0.94
# tables that several rows are from, at the commit that was read
_GPU_SPECS = "https://github.com/winston-zhang-orz/gpu-specs/blob/097f0fb34b7530bb7aa83535e5170a4c6701b5d7/specs.md"
_ML_ENGINEERING = "https://github.com/stas00/ml-engineering/blob/007447327a0cb851796ebf896f975566f8d97f38/compute/accelerator/README.md"
_LIGHTNING = (
    "https://github.com/Lightning-AI/pytorch-lightning/blob/0810121fef07bc70c1bf4706a81ecb47d2e6ad17/"
    "src/lightning/fabric/utilities/throughput.py"
)
_NVIDIA_SMI_TOTALS = "https://github.com/modal-labs/modal-client/pull/2797"


@dataclass(frozen=True, kw_only=True)
class Card:
    """One known device: its level, memory and peak rates.

    `sm` is None and the tensor rates are 0.0 where the device is no NVIDIA card. `no_kernels_since_cuda` is the first
    CUDA version whose torch builds hold no kernels for the card. `source` states the bandwidth, the fp32 rate and,
    unless `rates_source` names another page, the other rates but those in `derived`.
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
    rates_source: str
    derived: tuple[str, ...] = ()
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
    rates_source: str = "",
    derived: tuple[str, ...] = (),
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
        # torch 2.11, the oldest supported here, has kernels below SM 7.5 in its CUDA 12.6 builds only:
        # https://github.com/pytorch/pytorch/issues/172352, https://github.com/labomics/midas/releases/tag/v0.1.19
        no_kernels_since_cuda=(12, 8) if sm < (7, 5) else None,
        aliases=aliases,
        source=source,
        rates_source=rates_source or source,
        derived=tuple(f"{rate}_flops" for rate in derived),
        memory_source=memory_source or f"printed size {memory_gib:g} GiB less 6 %",
    )


CARDS: tuple[Card, ...] = (
    # the PCIe card of 16 GB; the SXM2 one computes 14 % faster
    _nvidia(
        "Tesla P100",
        sm=(6, 0),
        memory_gib=16,
        reported_gib=None,
        bandwidth_gb_per_s=732,
        tflops=(9.3, 18.7, 0, 0, 0),
        multiprocessors=56,
        tensor_cores=False,
        source="https://sysrqmts.com/ru/gpus/compare/nvidia-tesla-k40m-vs-nvidia-tesla-p100-pcie-16-gb",
        rates_source="https://tech4gamers.com/nvidia-tesla-p100-will-be-available-in-two-variants-of-16gb-12gb-hbm2/",
        aliases=("P100", "P100-PCIE-16GB"),
    ),
    # the SXM2 card of 16 GB; the PCIe one gives 14.1 and 112
    _nvidia(
        "Tesla V100",
        sm=(7, 0),
        memory_gib=16,
        reported_gib=None,
        bandwidth_gb_per_s=900,
        tflops=(15.7, 125, 0, 0, 0),
        multiprocessors=80,
        source=_GPU_SPECS,
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
        source="https://sysrqmts.com/en/gpus/nvidia/tesla/t4",
        rates_source=_LIGHTNING,
        memory_source="https://github.com/Zheng-Chong/CatVTON/issues/133",
        aliases=("T4",),
    ),
    # the GDDR5 card: the GDDR6 one has 192 GB/s, 2.85 and 5.7. SM 7.5 without tensor cores, and float16 gives NaN in
    # Stable Diffusion on the GTX 16xx (huggingface/diffusers issue 2153). SM level: https://forums.developer.nvidia.com/
    # t/does-gtx-1050ti-or-1650-for-notebook-support-tensorflow-gpu/77384/2
    _nvidia(
        "GeForce GTX 1650",
        sm=(7, 5),
        memory_gib=4,
        reported_gib=3.81,
        bandwidth_gb_per_s=128,
        tflops=(2.98, 5.97, 0, 0, 0),
        multiprocessors=14,
        tensor_cores=False,
        fp16_gives_nan=True,
        source="https://informatyk-szczecin.com/fr/carte-graphique-geforce-gtx-1650",
        derived=("fp16",),
        memory_source="https://github.com/ultralytics/yolov5/issues/285",
        aliases=("GTX 1650", "1650"),
    ),
    # `rates_source` gives 52 TFLOPS with fp16 accumulation
    _nvidia(
        "GeForce RTX 2060",
        sm=(7, 5),
        memory_gib=6,
        reported_gib=5.79,
        bandwidth_gb_per_s=336,
        tflops=(6.5, 25.8, 0, 0, 0),
        multiprocessors=30,
        source="https://fpsbench.com/compare/gpu/nvidia-quadro-m6000-vs-nvidia-geforce-rtx-2060",
        rates_source="https://galport.com/Understanding-the-Computational-Power-of-NVIDIA-GeForce-RTX-2060-GPU",
        derived=("fp16",),
        memory_source="https://github.com/facebookresearch/meshrcnn/issues/92",
        aliases=("RTX 2060", "2060"),
    ),
    # `rates_source` gives 101 TFLOPS, sparse and with fp16 accumulation
    _nvidia(
        "GeForce RTX 3060",
        sm=(8, 6),
        memory_gib=12,
        reported_gib=11.75,
        bandwidth_gb_per_s=360,
        tflops=(12.7, 25.5, 25.5, 12.7, 0),
        multiprocessors=28,
        source="https://sysrqmts.com/ru/gpus/compare/nvidia-geforce-rtx-3060-vs-nvidia-rtx-a6000",
        rates_source="https://techtaks.com/geforce-rtx-3060-nvidia-finally-details-the-specifications/",
        derived=("fp16", "bf16", "tf32"),
        memory_source="https://github.com/Kunhao-Liu/StyleGaussian/issues/12",
        aliases=("RTX 3060", "3060", "RTX 3060 12GB"),
    ),
    # `source` gives fp16 as 142 TFLOPS dense with fp16 accumulation
    _nvidia(
        "GeForce RTX 3090",
        sm=(8, 6),
        memory_gib=24,
        reported_gib=23.70,
        bandwidth_gb_per_s=936,
        tflops=(35.6, 71, 71, 35.6, 0),
        multiprocessors=82,
        source="https://holynerdvana.blogspot.com/2022/10/nvidia-geforce-rtx-3090-specifications.html",
        derived=("fp16", "bf16", "tf32"),
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
        source="https://waredb.com/processor/nvidia-geforce-rtx-4090",
        memory_source="https://github.com/ali-vilab/VGen/issues/104",
        aliases=("RTX 4090", "4090"),
    ),
    # `source` gives fp16 as 838.4 and fp8 as 1676.8 TFLOPS, sparse and with fp16 accumulation
    _nvidia(
        "GeForce RTX 5090",
        sm=(12, 0),
        memory_gib=32,
        reported_gib=31.36,
        bandwidth_gb_per_s=1792,
        tflops=(104.8, 209.5, 209.5, 104.8, 419),
        multiprocessors=170,
        source="https://www.spheron.network/blog/nvidia-rtx-5090-specs/",
        derived=("fp16", "bf16", "tf32", "fp8"),
        memory_source="https://github.com/TrajectoryCrafter/TrajectoryCrafter/issues/20",
        aliases=("RTX 5090", "5090"),
    ),
    _nvidia(
        "A10",
        sm=(8, 6),
        memory_gib=24,
        reported_gib=21.99,
        bandwidth_gb_per_s=600,
        tflops=(31.2, 125, 125, 62.5, 0),
        multiprocessors=72,
        source=_GPU_SPECS,
        derived=("fp16",),
        memory_source="https://github.com/zai-org/CogVLM/issues/236",
    ),
    # the plain name means the smaller of the two, so that a plan for "A100" runs on both
    _nvidia(
        "A100 40GB",
        sm=(8, 0),
        memory_gib=40,
        reported_gib=39.39,
        bandwidth_gb_per_s=1555,
        tflops=(19.5, 312, 312, 156, 0),
        multiprocessors=108,
        source=_GPU_SPECS,
        memory_source=(
            "https://huggingface.co/PrunaAI/mattshumer-Llama-3-8B-16K-HQQ-4bit-smashed/blob/"
            "521a1ba996efcc53055694ac9f876f5f24a236e3/results.json"
        ),
        aliases=("A100", "A100-SXM4-40GB", "A100-PCIE-40GB"),
    ),
    # the PCIe card, so that a plan runs on both: the SXM4 one has 2039 GB/s
    _nvidia(
        "A100 80GB",
        sm=(8, 0),
        memory_gib=80,
        reported_gib=79.25,
        bandwidth_gb_per_s=1935,
        tflops=(19.5, 312, 312, 156, 0),
        multiprocessors=108,
        source=_GPU_SPECS,
        memory_source="https://github.com/HiDream-ai/VAREdit/issues/6",
        aliases=("A100-SXM4-80GB", "A100 80GB PCIe"),
    ),
    _nvidia(
        "L4",
        sm=(8, 9),
        memory_gib=24,
        reported_gib=21.92,
        bandwidth_gb_per_s=300,
        tflops=(30.3, 121, 121, 60, 242),
        multiprocessors=58,
        source=_GPU_SPECS,
        memory_source=f"{_NVIDIA_SMI_TOTALS} (22.49 GiB) less the 0.57 GiB that CUDA leaves out of it on an L40S",
    ),
    _nvidia(
        "L40S",
        sm=(8, 9),
        memory_gib=48,
        reported_gib=44.42,
        bandwidth_gb_per_s=864,
        tflops=(91.6, 362, 362, 183, 733),
        multiprocessors=142,
        source=_GPU_SPECS,
        memory_source="https://github.com/stepfun-ai/Step-Video-T2V/issues/8",
    ),
    # the SXM5 card; the PCIe one gives 51, 756, 378 and 1513 and 2000 GB/s
    _nvidia(
        "H100",
        sm=(9, 0),
        memory_gib=80,
        reported_gib=85017493504 / _GIB,
        bandwidth_gb_per_s=3350,
        tflops=(67, 989, 989, 494.5, 1979),
        multiprocessors=132,
        source=_ML_ENGINEERING,
        memory_source="measured here by torch.cuda.mem_get_info() on an H100 80GB HBM3 (in no file of docs/benchmarks)",
        aliases=("H100 80GB HBM3", "H100 SXM"),
    ),
    _nvidia(
        "H200",
        sm=(9, 0),
        memory_gib=141,
        reported_gib=None,
        bandwidth_gb_per_s=4800,
        tflops=(67, 989, 989, 494.5, 1979),
        multiprocessors=132,
        source=_ML_ENGINEERING,
    ),
    # the HGX card of 180 GB at 1000 W; the driver gives 7672 GB/s (pytorch/ao pull 4002)
    _nvidia(
        "B200",
        sm=(10, 0),
        memory_gib=180,
        reported_gib=178.35,
        bandwidth_gb_per_s=7700,
        tflops=(75, 2250, 2250, 1100, 4500),
        multiprocessors=148,
        source="https://zdszero.github.io/Computer/Artificial_Intelligence/Hardware.html",
        rates_source="https://glennklockwood.com/garden/processors/B200",
        memory_source="https://github.com/pytorch/ao/pull/4002",
    ),
    Card(
        name="CPU",
        device_type="cpu",
        total_bytes=16 * _GIB,
        source="an assumption: a desktop with 16 GiB",
        rates_source="none given",
        memory_source="an assumption: a desktop with 16 GiB",
    ),
    Card(
        name="MPS",
        device_type="mps",
        total_bytes=int(10922.67 * 2**20),
        bandwidth_bytes_per_s=66.67e9,
        fp32_flops=2.6e12,  # fp16 is left out: the page gives twice as much, which nothing else read confirms
        source="https://askgeek.io/en/cpus/Apple/M1-8-core-GPU",
        rates_source="https://askgeek.io/en/cpus/Apple/M1-8-core-GPU",
        memory_source="https://github.com/ise-uiuc/magicoder/issues/19",
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
