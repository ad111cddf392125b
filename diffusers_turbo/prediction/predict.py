"""Peak memory before the first run: `predict_memory`, and a `Predictor` that answers several questions of one pipeline.

skeleton (the pipeline without weights) -> switches thrown on it -> each stage run on the meta device: a recording
-> replayed through the allocator's rules, with workspaces, and with weights that come and go -> peaks
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from ..attention import attention_layers
from ..errors import InvalidOptionError, NotSupportedError, explain_failure
from ..facts.device import DeviceFacts
from ..facts.pipeline import PipelineFacts, read_pipeline
from ..planning import options as opt
from ..planning.estimate import MemoryEstimate
from ..planning.memory import ENCODER_ROLES, estimate_memory, looped_names, offload_in_force, samples_at_once
from ..planning.options import Options
from ..planning.request import Request, settle
from .allocator import Allocator
from .calling import PipelineCall
from .inputs import Picture, prompt_tokens
from .recording import Marks, Recording
from .repeating import shorten, shorten_slices
from .replay import Peak, Replay
from .residency import ByShare, Weights, marked_paths, read_weights, residency_of
from .result import MemoryPrediction, StagePeak
from .skeleton import Skeleton, skeleton_of
from .stages import Stages, widens_vae
from .switches import (
    AS_PLAIN,
    IN_REPLAY,
    NO_DIFFERENCE,
    ON_DENOISER,
    ON_VAE,
    UNMEASURED,
    in_force,
    throw,
    thrown_for_stage,
)
from .workspaces import Workspaces, workspaces_of

MARGIN_ESTIMATED = 0.15
"""The margin where a stage is the closed-form estimate, or code that a compiler made."""

ASSUMED_CARD = "H100"
"""Whose kernels and workspaces are assumed where no device is named: those that were measured."""


def predict_memory(
    pipe: Any,
    *,
    height: int | None = None,
    width: int | None = None,
    batch_size: int = 1,
    options: Sequence[Options] = (),
    device: DeviceFacts | None = None,
    dtype: str = "float16",
) -> MemoryPrediction:
    """Predict the peak memory of each stage of a call, allocated and reserved, without a GPU.

    The pipeline's own networks run on the meta device, where tensors have shapes and no values; no weight is read or
    copied. What that cannot show (workspaces of cuDNN and cuBLAS) is a model fitted to measurements.

    Args:
        pipe: a diffusers pipeline on any device, or the name of an architecture such as "sdxl".
        height, width: pixels; by default the model's own.
        batch_size: pictures per call.
        options: switches assumed on beside those that are, such as `VAESlicing()`.
        device: whose kernels and workspaces; by default those of the H100 that was measured.
        dtype: of the weights of an architecture; a pipeline has its own.

    Raises:
        NotSupportedError: no pipeline, or one without a denoiser.
        InvalidOptionError: the size is no multiple of what the model needs, or no architecture has this name.
    """
    return Predictor(pipe, device=device, dtype=dtype)(
        height=height, width=width, batch_size=batch_size, options=options
    )


@dataclass(frozen=True)
class _Prepared:
    """A skeleton with its switches thrown, marks on its modules, its weights, and what could not be thrown.

    `widened`: the pipeline casts its VAE to float32 to work; the skeleton's is cast, its weights are given as they are
    between the stages.
    """

    skeleton: Skeleton
    weights: Weights
    told: tuple[str, ...]
    widened: bool


@dataclass
class Predictor:
    """Predictions for one pipeline; what was run for one question is not run again for the next.

    Offload and graphs change nothing of what networks do, so that a plan's whole ladder costs few runs.

    >>> from diffusers_turbo.planning.options import ModelOffload
    >>> peaks = Predictor("sd15")
    >>> peaks(options=[ModelOffload()]).peak_bytes < peaks().peak_bytes
    True
    """

    pipe: Any
    device: DeviceFacts | None = None
    dtype: str = "float16"
    workspaces: Workspaces | None = None
    _prepared: dict[tuple[Options, ...], _Prepared] = field(default_factory=dict, repr=False)
    _recordings: dict[Any, Recording] = field(default_factory=dict, repr=False)
    _marks: Marks = field(default_factory=Marks, repr=False)
    _encoders: dict[bool, dict[str, nn.Module]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.pipe, str):
            self.pipe = _architecture(self.pipe, self.dtype)
        elif isinstance(self.pipe, PipelineFacts):
            found, needed = "facts, which hold no networks to run", "the pipeline, or the name of an architecture"
            raise NotSupportedError(
                explain_failure("predict_memory()", found, needed, "use planning.memory.estimate_memory() for facts")
            )
        if self.device is None:
            self.device = DeviceFacts.card(ASSUMED_CARD)
        if self.workspaces is None:
            self.workspaces = workspaces_of(self.device.sm)

    def __call__(
        self,
        *,
        height: int | None = None,
        width: int | None = None,
        batch_size: int = 1,
        options: Sequence[Options] = (),
    ) -> MemoryPrediction:
        """Predict; see `predict_memory`."""
        return self._predict(height, width, batch_size, options)

    def _predict(
        self,
        height: int | None,
        width: int | None,
        batch_size: int,
        options: Sequence[Options],
        *,
        only_tight: bool = False,
    ) -> MemoryPrediction:
        assert self.device is not None
        options = in_force(self.pipe, _checked(options))
        prepared = self._prepare(options)
        facts = prepared.skeleton.facts
        situation = settle(facts, self.device, Request(height=height, width=width, batch_size=batch_size))
        picture = Picture(height=situation.height, width=situation.width, batch_size=batch_size)
        estimate = estimate_memory(facts, picture.height, picture.width, batch_size, options)
        recordings = self._record(prepared, options, picture, estimate)
        tight = self._replay(prepared, options, picture, recordings, tight=True)
        peaks = tight if only_tight else self._replay(prepared, options, picture, recordings)
        least = {stage: peak.reserved for stage, peak in tight.items()}
        return self._tell(prepared, options, picture, recordings, peaks, least)

    def estimate(
        self,
        pipeline_facts: PipelineFacts,
        height: int,
        width: int,
        batch_size: int = 1,
        options: Sequence[Options] = (),
    ) -> MemoryEstimate:
        """Answer as `planning.memory.estimate_memory` does, for the planner: at the edge of a cap."""
        return self._predict(height, width, batch_size, options, only_tight=True).as_estimate()

    @cached_property
    def _facts(self) -> PipelineFacts:
        return read_pipeline(self.pipe)

    def _prepare(self, options: Sequence[Options]) -> _Prepared:
        assert self.device is not None
        left_out = (*IN_REPLAY, *NO_DIFFERENCE, *AS_PLAIN, *ON_VAE, *ON_DENOISER)
        thrown = tuple(option for option in options if not isinstance(option, left_out))
        if thrown not in self._prepared:
            # which no other switch is about
            encoders = self._encoders.setdefault(any(isinstance(option, opt.HalfPrecision) for option in thrown), {})
            skeleton = skeleton_of(self.pipe, self._facts, copied=encoders)
            already = in_force(self.pipe, ())
            told = throw(skeleton, thrown, already, self.device)
            blobs = {
                part.name: part.parameter_bytes for part in skeleton.facts.components if part.name in skeleton.left_out
            }
            weights = read_weights(skeleton.pipe, skeleton.modules, blobs)
            paths = marked_paths(weights)
            fresh = {name: root for name, root in skeleton.modules.items() if name not in encoders}
            for component, root in fresh.items():
                for name, module in root.named_modules():
                    path = f"{component}.{name}" if name else component
                    if path in paths:
                        self._marks.put_on(module, path)
            roles = {part.name: part.role for part in skeleton.facts.components}
            encoders.update((name, root) for name, root in fresh.items() if roles.get(name) in ENCODER_ROLES)
            if (vae := skeleton.modules.get("vae")) is not None:
                shorten(vae, self._marks)
            if (denoiser := skeleton.modules.get(skeleton.facts.denoiser)) is not None:
                shorten_slices(denoiser, self._marks)
            if widened := widens_vae(skeleton.pipe) and "vae" in skeleton.modules:
                # past diffusers' own `to`, which warns of modules that it would keep
                nn.Module.to(skeleton.modules["vae"], torch.float32)
            self._prepared[thrown] = _Prepared(skeleton, weights, tuple(told), widened)
        return self._prepared[thrown]

    def _record(
        self, prepared: _Prepared, options: Sequence[Options], picture: Picture, estimate: MemoryEstimate
    ) -> dict[str, Recording]:
        assert self.device is not None
        stages = Stages(prepared.skeleton, self.device, picture, self._marks)
        found = {}
        for stage in stages.names():
            # what only the VAE heeds makes no other stage differ
            key = (stage, picture, tuple(x for x in options if _matters(x, stage)))
            if key not in self._recordings:
                closed = estimate.stage("encode" if stage == "vae_encode" else stage)
                of_stage = [option for option in key[2] if isinstance(option, (*ON_VAE, *ON_DENOISER))]
                with thrown_for_stage(prepared.skeleton, of_stage, in_force(self.pipe, ()), self._marks) as told:
                    self._recordings[key] = replace(stages.record(stage, closed), told=tuple(told))
            found[stage] = self._recordings[key]
        return found

    def _replay(
        self,
        prepared: _Prepared,
        options: Sequence[Options],
        picture: Picture,
        recordings: dict[str, Recording],
        *,
        tight: bool = False,
    ) -> dict[str, Peak]:
        on = {type(option): option for option in options}
        facts, widens, weights = prepared.skeleton.facts, prepared.widened, prepared.weights
        allocator = Allocator(tight=tight)
        offload = offload_in_force(facts, on)
        tiled = opt.VAETiling in on or bool(getattr(getattr(self.pipe, "vae", None), "use_tiling", False))
        whole = widens or (tiled and bool(getattr(offload, "use_stream", False)))
        if offload is not None and widens:
            weights = weights.widened("vae")  # cast where they wait
        residency = residency_of(
            offload,
            weights,
            allocator,
            vae_as_a_whole=whole,
            looped=looped_names(facts),
            step=recordings["denoise"].events,
        )
        assert self.workspaces is not None
        replay = Replay(allocator, self.workspaces, residency)
        samples = samples_at_once(facts, picture.batch_size)
        call = PipelineCall(
            replay,
            recordings,
            widens_vae=widens,
            keeps_wide=opt.VAEUpcastCopy in on,
            offloaded=offload is not None,
            graphs=opt.CUDAGraphs in on,
            # what is streamed is recorded with the window that it passes through
            leaves=isinstance(residency, ByShare) and (residency.leaves or bool(residency.window_sizes)),
            share_of_batch=samples_at_once(facts, picture.batch_size, options) / samples,
            projected_bytes=_projected_bytes(prepared, picture) if opt.PromptProjections in on else 0,
        )
        return call.peaks()

    def _tell(
        self,
        prepared: _Prepared,
        options: Sequence[Options],
        picture: Picture,
        recordings: dict[str, Recording],
        peaks: dict[str, Peak],
        least: dict[str, int],
    ) -> MemoryPrediction:
        assert self.device is not None
        assert self.workspaces is not None
        workspaces, facts = self.workspaces, prepared.skeleton.facts
        stages = tuple(_stage(name, peak, least[name], recordings[name].reasons) for name, peak in peaks.items())
        refused = dict.fromkeys(sentence for recording in recordings.values() for sentence in recording.told)
        notes = [*self._about_level(), *prepared.told, *refused]
        estimated = [stage for stage in stages if stage.estimated]
        notes += [f"{stage.stage} is the closed-form estimate: {stage.estimated}" for stage in estimated]
        notes += dict.fromkeys(AS_PLAIN[type(option)] for option in options if type(option) in AS_PLAIN)
        unsure = bool(estimated) or any(isinstance(option, UNMEASURED) for option in options)
        return MemoryPrediction(
            stages=stages,
            margin=max(workspaces.margin, MARGIN_ESTIMATED if unsure else 0.0),
            measured=workspaces.measured,
            facts={
                "pipeline": f"{facts.class_name} ({facts.family}, {facts.denoiser_facts.dtype})",
                "device": self.device.name,
                "sm": list(self.device.sm) if self.device.sm else None,
                "height": picture.height,
                "width": picture.width,
                "batch_size": picture.batch_size,
                "options": [repr(option) for option in options],
                "workspaces": workspaces.source,
            },
            notes=tuple(notes),
            operators=sum(recording.operators for recording in recordings.values()),
        )

    def _about_level(self) -> list[str]:
        assert self.device is not None
        assert self.workspaces is not None
        workspaces = self.workspaces
        if workspaces.measured:
            return []
        if self.device.sm is None:
            return [f"{self.device.name} has no CUDA allocator: these are the peaks of an H100"]
        level = ".".join(map(str, self.device.sm))
        return [
            f"workspaces were never measured on SM level {level}: those of SM "
            f"{workspaces.sm[0]}.{workspaces.sm[1]} are assumed, with a margin of {workspaces.margin:.0%}"
        ]


def _checked(options: Sequence[Options]) -> Sequence[Options]:
    for option in options:
        if not isinstance(option, Options):
            found, needed = f"{option!r} among the options", "options such as VAESlicing()"
            do = 'make them with planning.options.make_options("enable_vae_slicing")'
            raise InvalidOptionError(explain_failure("predict_memory()", found, needed, do))
    return options


def _stage(name: str, peak: Peak, least_bytes: int, reasons: tuple[str, ...]) -> StagePeak:
    asked = peak.weights + peak.activations + peak.workspace + peak.graphs
    return StagePeak(
        stage=name,
        allocated_bytes=peak.allocated,
        reserved_bytes=peak.reserved,
        least_bytes=least_bytes,
        weights_bytes=peak.weights,
        activation_bytes=peak.activations,
        workspace_bytes=peak.workspace,
        graph_bytes=peak.graphs,
        slack_bytes=peak.allocated - asked,
        estimated="; ".join(reasons),
    )


def _architecture(name: str, dtype: str) -> Any:
    from ..bench.architectures import build

    return build(name, dtype=getattr(torch, dtype), device="meta")


def _matters(option: Options, stage: str) -> bool:
    """Whether a switch changes what the networks of a stage do."""
    if isinstance(option, (*IN_REPLAY, *NO_DIFFERENCE, *AS_PLAIN)):
        return False
    if stage == "encode":
        return isinstance(option, opt.HalfPrecision)
    return not isinstance(option, ON_VAE if stage == "denoise" else ON_DENOISER)


def _projected_bytes(prepared: _Prepared, picture: Picture) -> int:
    """Keys and values of the prompt, of all cross-attention layers at once: what prompt projections keep."""
    skeleton = prepared.skeleton
    denoiser = skeleton.modules.get(skeleton.facts.denoiser)
    if denoiser is None:
        return 0
    layers = [layer for layer in attention_layers(denoiser).values() if layer.is_cross_attention]
    width = sum(2 * layer.inner_kv_dim for layer in layers)
    item = next(denoiser.parameters()).element_size()
    samples = samples_at_once(skeleton.facts, picture.batch_size)
    return int(width * prompt_tokens(skeleton.pipe) * samples * item)
