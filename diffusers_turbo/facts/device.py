"""What the device can do: `DeviceFacts`, by asking a real one (`probe`) or from the catalog (`DeviceFacts.card`).

Importing this module asks nothing. `probe()` creates the CUDA context and reads properties; the kernels that really
run are tried only when `sdpa_kernels` or `xformers_kernels` is first read, since the first cuDNN attention call of a
process can take seconds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

from .cards import find_card

KernelTable = Mapping[str, tuple[str, ...]]
"""Backend or operator name -> the dtypes it runs with, by name."""

# What the CUDA context takes of a card, which the catalog's rows have to give as well. Measured: 527 MiB by
# mem_get_info in a fresh process on an H100 with torch 2.11.0+cu130, the card with the most SMs
# measured so far; smaller cards take less.
CONTEXT_BYTES = 527 * 2**20

# Turing chips without tensor cores (TU116, TU117): GeForce GTX 16xx, MX450/550 and the small T-series workstations.
# float16 gives NaN in Stable Diffusion on a GTX 1660 (https://github.com/huggingface/diffusers/issues/2153 and
# https://github.com/pytorch/pytorch/issues/58123); ComfyUI refuses float16 on all of these but the T400, of which no
# report was found (should_use_fp16 in comfy/model_management.py of https://github.com/comfyanonymous/ComfyUI).
_TU11X = re.compile(r"\bGTX 16\d0\b|\bMX[45]50\b|\bT(?:400|500|550|600|1000|1200|2000)\b", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class DeviceFacts:
    """What is true of one device and of the packages beside it.

    Attributes:
        device: the torch device, such as "cuda:0", "cpu" or "mps".
        device_type: "cuda", "cpu", "mps" or another torch device type.
        name: the device's own name.
        sm: NVIDIA compute capability such as (8, 6); None where there is none (CPU, MPS, AMD).
        arch_list: the architectures torch was built for, such as ("sm_80", "compute_90").
        total_bytes: device memory that the driver reports; host memory for the CPU.
        free_bytes: of it, what is free now.
        host_ram_bytes: available host memory, where offloaded weights go; 0 when unknown.
        multiprocessors: how many SMs the card has; cores for the CPU; 0 when unknown.
        tensor_cores: whether 16-bit matrix products run on tensor cores.
        refusals: "fp16", "bf16", "tf32", "fp8" or "torch" -> why it is not usable here, natively and without known NaN.
        triton: whether Triton can be imported for this device.
        cxx_compiler: the C++ compiler found, None if there is none.
        versions: package -> version, for what is installed.
        assumed: True for a catalog card: nothing was asked of a real device.
        predicted_sdpa, predicted_xformers: kernel tables of a catalog card, by rule instead of by trial.
        notes: what to know beside the numbers.
    """

    device: str
    device_type: str
    name: str
    sm: tuple[int, int] | None = None
    arch_list: tuple[str, ...] = ()
    total_bytes: int = 0
    free_bytes: int = 0
    host_ram_bytes: int = 0
    multiprocessors: int = 0
    tensor_cores: bool = False
    refusals: Mapping[str, str] = field(default_factory=dict)
    triton: bool = False
    cxx_compiler: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    assumed: bool = False
    predicted_sdpa: KernelTable | None = None
    predicted_xformers: KernelTable | None = None
    notes: tuple[str, ...] = ()

    @property
    def fp16(self) -> bool:
        """Whether float16 is usable."""
        return "fp16" not in self.refusals

    @property
    def bf16(self) -> bool:
        """Whether bfloat16 is usable."""
        return "bf16" not in self.refusals

    @property
    def tf32(self) -> bool:
        """Whether TF32 matrix products are usable."""
        return "tf32" not in self.refusals

    @property
    def fp8(self) -> bool:
        """Whether the card multiplies float8."""
        return "fp8" not in self.refusals

    @cached_property
    def sdpa_kernels(self) -> KernelTable:
        """SDPA backend -> dtypes it runs with; tried on the device at first reading, predicted for a card."""
        if self.predicted_sdpa is not None:
            return self.predicted_sdpa
        from .kernels import probe_sdpa

        return probe_sdpa(self.device)

    @cached_property
    def xformers_kernels(self) -> KernelTable:
        """xFormers forward operator -> dtypes it runs with; tried at first reading, empty for a card."""
        if self.predicted_xformers is not None:
            return self.predicted_xformers
        from .kernels import probe_xformers

        return probe_xformers(self.device)

    @property
    def kernels_predicted(self) -> bool:
        """True where the SDPA table is a rule's prediction and no kernel was run."""
        return self.predicted_sdpa is not None

    def fused_sdpa(self, dtype: str) -> tuple[str, ...]:
        """Return the SDPA backends that run with this dtype and never hold the score matrix."""
        table = self._sdpa_tried.get(dtype)
        if table is None:
            table = self._sdpa_tried[dtype] = self.sdpa_kernels if self._knows_sdpa else self._try_sdpa(dtype)
        return tuple(name for name, dtypes in table.items() if name != "math" and dtype in dtypes)

    @cached_property
    def _sdpa_tried(self) -> dict[str, KernelTable]:
        return {}

    @property
    def _knows_sdpa(self) -> bool:
        """Whether the whole table costs nothing: it is a card's, or was read before."""
        return self.predicted_sdpa is not None or "sdpa_kernels" in vars(self)

    def _try_sdpa(self, dtype: str) -> KernelTable:
        """Try one dtype alone: cuDNN takes a good part of a second to plan its first call of each."""
        from .kernels import probe_sdpa

        return probe_sdpa(self.device, (dtype,))

    @classmethod
    def card(cls, name: str) -> DeviceFacts:
        """Return the facts of a known card with nothing present, for plans about machines one does not have.

        A torch build with kernels for the card, Triton and a C++ compiler are assumed; `notes` says where the first
        is no longer a matter of course.

        Raises:
            InvalidOptionError: no such card; the text names close matches.

        >>> DeviceFacts.card("rtx 3060").sm
        (8, 6)
        """
        row = find_card(name)
        cuda = row.device_type == "cuda"
        notes = [f"{row.name} from the catalog: no device was asked, kernels are predicted from the SM level"]
        if row.no_kernels_since_cuda:
            version = ".".join(map(str, row.no_kernels_since_cuda))
            notes.append(
                f"torch builds for CUDA {version} and newer hold no kernels for {row.name}: use a CUDA 12.6 build"
            )
        return cls(
            device="cuda:0" if cuda else row.device_type,
            device_type=row.device_type,
            name=row.name,
            sm=row.sm,
            arch_list=(f"sm_{row.sm[0]}{row.sm[1]}",) if row.sm else (),
            total_bytes=row.total_bytes,
            free_bytes=row.total_bytes - (CONTEXT_BYTES if cuda else 0),
            multiprocessors=row.multiprocessors,
            tensor_cores=row.tensor_cores,
            refusals=unusable_formats(row.device_type, row.sm, row.name),
            triton=cuda and row.sm is not None and row.sm >= (7, 0),
            cxx_compiler=None if row.device_type == "mps" else "c++ (assumed)",
            assumed=True,
            predicted_sdpa=predict_sdpa(row.device_type, row.sm),
            predicted_xformers={},
            notes=tuple(notes),
        )

    def as_dict(self, *, kernels: bool = True) -> dict[str, Any]:
        """Return plain data; `kernels=False` leaves out what would have to be tried on the device first."""
        data = {item.name: getattr(self, item.name) for item in fields(self) if not item.name.startswith("predicted")}
        data |= {"fp16": self.fp16, "bf16": self.bf16, "tf32": self.tf32, "fp8": self.fp8}
        if kernels:
            data["sdpa_kernels"] = self.sdpa_kernels
            data["xformers_kernels"] = self.xformers_kernels
        data["kernels_predicted"] = self.kernels_predicted
        return {key: _plain(value) for key, value in data.items()}

    def to_json(self, *, kernels: bool = True, indent: int | None = 2) -> str:
        """Return `as_dict` as JSON text."""
        return json.dumps(self.as_dict(kernels=kernels), indent=indent)


def probe(device: object = None) -> DeviceFacts:
    """Ask a device what it can do; the current CUDA device, else MPS, else the CPU, when none is named.

    Never raises because something is missing: what is absent is said in the facts. Changes nothing but that the
    device's context exists afterwards.

    >>> probe("cpu").device_type
    'cpu'
    """
    from .probing import probe_device

    return probe_device(device)


def unusable_formats(device_type: str, sm: tuple[int, int] | None, name: str) -> dict[str, str]:
    """Say which number formats are not usable, and why: {"bf16": "bfloat16 needs SM 8.0, ..."}.

    Sources: bf16 from 8.0 and fp8 from 8.9 (https://nvidia.github.io/TransformerEngine/support_matrix.html), tf32 from
    8.0 (https://docs.modular.com/mojo/std/gpu/compute/arch/mma_nvidia), fp16 from 5.3
    (https://github.com/NVlabs/instant-ngp/pull/87); fp16 on GTX 16xx: see `_TU11X`. For fp16 on the CPU no report was
    found: refusing it there is this project's own caution.
    """
    refusals: dict[str, str] = {}
    if device_type == "cpu":
        refusals["fp16"] = "float16 on a CPU overflows to NaN in diffusion models and is slower than float32"
    elif device_type == "cuda" and lacks_tensor_cores(sm, name):
        refusals["fp16"] = f"float16 gives NaN in Stable Diffusion on {name} (Turing without tensor cores)"
    if device_type == "mps":
        refusals["bf16"] = "bfloat16 on MPS depends on the macOS version and was not tried"
    if device_type == "cuda" and sm is not None:
        level = f"SM {sm[0]}.{sm[1]}"
        if sm < (5, 3):
            refusals["fp16"] = f"float16 arithmetic needs SM 5.3, this card is {level}"
        if sm < (8, 0):
            refusals["bf16"] = f"bfloat16 needs SM 8.0, this card is {level} and would only emulate it"
            refusals["tf32"] = f"TF32 needs tensor cores of SM 8.0, this card is {level}"
        if sm < (8, 9):
            refusals["fp8"] = f"float8 needs tensor cores of SM 8.9, this card is {level}"
    else:
        refusals["tf32"] = f"TF32 exists on NVIDIA cards only, this is {name}"
        refusals["fp8"] = f"float8 tensor cores are known on NVIDIA cards only, this is {name}"
    return refusals


def lacks_tensor_cores(sm: tuple[int, int] | None, name: str) -> bool:
    """True for the Turing cards of SM 7.5 that have no tensor cores, which the SM level alone does not tell.

    >>> lacks_tensor_cores((7, 5), "NVIDIA GeForce GTX 1660 Ti"), lacks_tensor_cores((7, 5), "Tesla T4")
    (True, False)
    """
    return sm == (7, 5) and _TU11X.search(name) is not None


def missing_kernels(sm: tuple[int, int], arch_list: tuple[str, ...]) -> list[str]:
    """Say why a torch built for `arch_list` has no kernels for a card of level `sm`; an empty list means it has.

    A binary (sm_86) runs on its own level and on later minor levels of the same major; PTX (compute_86) is compiled
    by the driver for every later level; arch-specific code (sm_90a) runs on its own level only, and family code
    (sm_120f) within its major. https://docs.nvidia.com/cuda/blackwell-compatibility-guide (binaries and PTX),
    https://modal.com/gpu-glossary/device-software/compute-capability (the suffixes)

    >>> missing_kernels((8, 6), ("sm_80", "sm_90"))
    []
    """
    for arch in arch_list:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", arch)
        if not match:
            continue
        kind, suffix = match[1], match[4]
        built = (int(match[2]), int(match[3]))
        if suffix == "a":
            runs = built == sm
        elif kind == "compute" and not suffix:
            runs = built <= sm
        else:
            runs = built[0] == sm[0] and built[1] <= sm[1]
        if runs:
            return []
    found = ", ".join(arch_list) or "no CUDA architecture"
    return [f"this torch was built for {found}, and the card is SM {sm[0]}.{sm[1]}"]


def predict_sdpa(device_type: str, sm: tuple[int, int] | None) -> dict[str, tuple[str, ...]]:
    """Predict the SDPA table from the SM level, by the checks in torch's own dispatcher.

    flash from SM 8.0 (fp16, bf16), memory-efficient from SM 5.0 (bf16 from 8.0), cuDNN from SM 8.0 (fp16, bf16), each
    up to SM 12.1, past every level known here:
    https://github.com/pytorch/pytorch/blob/main/aten/src/ATen/native/transformers/cuda/sdp_utils.cpp
    """
    every = ("float16", "bfloat16", "float32")
    if device_type == "cpu":
        return {"flash": every, "math": every}
    if device_type != "cuda" or sm is None:
        return {"math": every}
    table: dict[str, tuple[str, ...]] = {}
    half = ("float16", "bfloat16")
    if sm >= (8, 0):
        table["flash"] = half
    if sm >= (5, 0):
        table["efficient"] = every if sm >= (8, 0) else ("float16", "float32")
    if sm >= (8, 0):
        table["cudnn"] = half
    return {**table, "math": every}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
