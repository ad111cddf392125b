"""Measure a pipeline against the fp32 reference and judge it: a `Yardstick` once, `measure` as often as needed."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any, Literal

import torch

from ..actions.ledger import ledger_of
from ..actions.precision import cast
from ..copying import untouched_copy
from ..facts.pipeline import execution_device
from ..parity import CLOSE_DB, EXACT_FP32_DB, EXACT_RATIO, Distance, Verdict, distance, judge
from .inputs import Inputs
from .pictures import Pictures, denoiser_dtype, replay_pictures
from .reference import record_reference
from .similarity import flip, ssim

Promise = Literal["exact", "close"]

_RANK = {"exact": 0, "close": 1, "different": 2}

THRESHOLDS = (
    f"exact: at least {EXACT_FP32_DB:.0f} dB in fp32, or at most {EXACT_RATIO} times as far as stock in the same dtype;"
    f" close: at least {CLOSE_DB:.0f} dB; no picture with NaN, none black"
)


@dataclass(frozen=True, kw_only=True)
class Verification:
    """How far a pipeline's pictures are from the reference's, and whether it keeps what it promises.

    Attributes:
        pipeline, device, dtype: what was checked; the dtype is the one it denoises in.
        pairs, steps: prompt-and-seed pairs and denoising steps of each.
        reference: what the reference was, in words.
        ours: distance of the pictures and latents from the reference.
        stock: distance of stock diffusers in the same dtype; None where it was not needed.
        verdict: exact, close or different.
        promise: what the levers in force promise.
        made: the pictures themselves, `[P, 3, H, W]` of both.
    """

    pipeline: str
    device: str
    dtype: str
    pairs: int
    steps: int
    reference: str
    ours: Distance
    stock: Distance | None
    verdict: Verdict
    promise: Promise
    made: tuple[torch.Tensor, torch.Tensor] = field(repr=False, compare=False)

    @cached_property
    def ssim(self) -> float | None:
        """Structural similarity, the mean over the pictures; None without its package."""
        return ssim(*self.made)

    @cached_property
    def flip(self) -> float | None:
        """FLIP's error, the mean over the pictures; None without its package."""
        return flip(*self.made)

    @property
    def kept(self) -> bool:
        """Whether the verdict is at least what was promised."""
        return _RANK[self.verdict.level] <= _RANK[self.promise]

    def as_dict(self) -> dict[str, Any]:
        """Return plain data, without the pictures."""
        plain = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "made"}
        distances = {name: asdict(value) if (value := plain[name]) else None for name in ("ours", "stock", "verdict")}
        seen = {"ssim": self.ssim, "flip": self.flip}
        return {**plain, **distances, **seen, "kept": self.kept, "thresholds": THRESHOLDS}

    def to_json(self) -> str:
        """Return `as_dict` as JSON; an infinite PSNR (equal to the bit) is null there."""
        return json.dumps(_finite(self.as_dict()), indent=2)

    def explain(self) -> str:
        """Return the result as text."""
        kind = self.verdict.level.upper() if not self.kept else self.verdict.level
        size = "x".join(map(str, self.made[0].shape[-2:][::-1]))
        lines = [
            f"{self.pipeline} on {self.device} in {self.dtype}: {kind} (promised: {self.promise})",
            f"  {self.pairs} prompt-and-seed pairs, {self.steps} steps, {size}, against {self.reference}",
            f"  ours:  {_distance_text(self.ours)}",
        ]
        if self.stock is not None:
            lines.append(f"  stock: {_distance_text(self.stock)}, diffusers itself in {self.dtype}")
        perceived = [
            f"{name} {value:.4f}" for name, value in (("SSIM", self.ssim), ("FLIP", self.flip)) if value is not None
        ]
        if perceived:
            lines.append(f"  {', '.join(perceived)}")
        lines.extend(f"  {reason}" for reason in self.verdict.reasons)
        return "\n".join([*lines, f"  {THRESHOLDS}"])

    def __str__(self) -> str:
        return self.explain()


def promised(pipe: Any) -> Promise:
    """Return what the levers in force promise.

    A change of dtype promises no less than exactness in that dtype: its own distance is stock's too.
    """
    ledger = ledger_of(pipe)
    lossy = ledger is not None and any(
        not lever.options.exact and lever.options.slot != "precision" for lever in ledger.in_force()
    )
    return "close" if lossy else "exact"


class Yardstick:
    """The reference's pictures, and stock's distance from them in each dtype that is asked for.

    Making one runs the reference. It keeps a copy of the untouched pipeline in host memory.
    """

    def __init__(self, pipe: Any, inputs: Inputs, reference: Any = None, *, device: torch.device | None = None) -> None:
        """Run the reference: an untouched copy of `pipe`, or of the pipeline given; on `device`, or where `pipe` is."""
        self.inputs = inputs
        self.device = device or execution_device(pipe)
        self._untouched = untouched_copy(pipe if reference is None else reference)
        self._stock: dict[tuple[torch.dtype, str | None], Distance] = {}
        twin = untouched_copy(self._untouched)
        self.pictures, self.tapes, self.name = record_reference(twin, inputs, self.device)

    def measure(self, pipe: Any, promise: Promise | None = None, autocast: str | None = None) -> Verification:
        """Run `pipe` on the reference's latents and embeddings and judge it.

        Args:
            pipe: the pipeline to check.
            promise: what it must keep; by default what its levers promise.
            autocast: dtype of `torch.autocast` around the calls.
        """
        made = self._replay(pipe, autocast)
        ours = self._distance(made)
        dtype = denoiser_dtype(pipe)
        half = dtype != torch.float32 or autocast is not None
        stock = self._stock_distance(dtype, autocast) if half or self.device.type != "cpu" else None
        return Verification(
            pipeline=type(pipe).__name__,
            device=str(self.device),
            dtype=autocast or str(dtype).removeprefix("torch."),
            pairs=ours.pictures,
            steps=self.inputs.steps,
            reference=self.name,
            ours=ours,
            stock=stock,
            verdict=judge(ours, stock, half=half),
            promise=promise or promised(pipe),
            made=(made.pictures, self.pictures.pictures),
        )

    def _stock_distance(self, dtype: torch.dtype, autocast: str | None) -> Distance:
        if (dtype, autocast) not in self._stock:
            stock = untouched_copy(self._untouched)
            if denoiser_dtype(stock) != dtype:
                cast(stock, dtype)
            self._stock[dtype, autocast] = self._distance(self._replay(stock.to(self.device), autocast))
        return self._stock[dtype, autocast]

    def _replay(self, pipe: Any, autocast: str | None) -> Pictures:
        with _autocast(self.device, autocast):
            return replay_pictures(pipe, self.inputs, self.tapes)

    def _distance(self, made: Pictures) -> Distance:
        theirs = self.pictures
        return distance(made.pictures, theirs.pictures, made.latents, theirs.latents)


def _autocast(device: torch.device, dtype: str | None) -> AbstractContextManager[Any]:
    return nullcontext() if dtype is None else torch.autocast(device.type, getattr(torch, dtype))


def _distance_text(found: Distance) -> str:
    latents = "" if found.latents is None else f", latents {found.latents:.2g} apart"
    return f"{found.psnr_db:.1f} dB (worst picture {found.worst_psnr_db:.1f}){latents}"


def _finite(value: Any) -> Any:
    """Replace NaN and infinities, which JSON does not know, by None."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not (-float("inf") < value < float("inf")):
        return None
    return value
