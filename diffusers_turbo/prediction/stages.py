"""The stages of a pipeline's call, run on the meta device: what each does to memory, as a recording.

Stages are what pipelines have in common. What is between their networks (a scheduler's few latents) is made here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..actions.components import networks_in
from ..facts.device import DeviceFacts
from ..facts.pipeline import upcasts_vae
from ..planning.estimate import StageMemory
from ..planning.memory import ENCODER_ROLES, LOOPED_ROLES
from .attention import KernelMemory
from .inputs import (
    VAES,
    Call,
    Picture,
    UnknownInputs,
    controlnet_inputs,
    denoiser_inputs,
    takes_pictures,
    text_inputs,
)
from .recording import Entered, Left, Marks, Recorder, Recording
from .skeleton import Skeleton

STAGES = ("encode", "vae_encode", "denoise", "decode")
"""In the order in which they run; a pipeline that makes pictures from text alone has no "vae_encode"."""


class Stages:
    """Records the stages of one skeleton, on one device, for one size."""

    def __init__(self, skeleton: Skeleton, device: DeviceFacts, picture: Picture, marks: Marks) -> None:
        self.skeleton, self.device, self.picture, self.marks = skeleton, device, picture, marks
        self.pipe, self.facts = skeleton.pipe, skeleton.facts
        self._inputs: list[tuple[int, ...]] = []
        self.recorder = Recorder()

    def names(self) -> list[str]:
        """The stages that a call of this pipeline has."""
        return [
            name for name in STAGES if name != "vae_encode" or (self._vae is not None and takes_pictures(self.pipe))
        ]

    def record(self, stage: str, estimate: StageMemory) -> Recording:
        """Record a stage; `estimate` stands in for what cannot be run."""
        parts: dict[str, Callable[[], Iterator[Any]]] = {
            "encode": self._encode,
            "vae_encode": self._vae_encode,
            "denoise": self._denoise,
            "decode": self._decode,
        }
        self._inputs = []
        self.recorder = recorder = Recorder(self.skeleton.modules.values())
        reasons: list[str] = []
        kept: list[Any] = []
        with self.marks.to(recorder), torch.no_grad(), KernelMemory(self.device), recorder:
            try:
                kept.extend(parts[stage]())
            except Exception as error:  # whatever a network does with inputs that were not meant for it
                told = str(error) if isinstance(error, UnknownInputs) else f"{type(error).__name__}: {error}"
                reasons.append(" ".join(told.split())[:300])
                error.__traceback__ = None
        left = recorder.close()
        if reasons:
            recorder.events.clear()
            size = estimate.activation_bytes
            recorder.events += [Entered(name) for name in self._components(stage)]
            if size:
                recorder.give_back(recorder.borrow(size))
            recorder.events += [Left(name) for name in self._components(stage)]
            left = ()
        return Recording(
            events=tuple(recorder.events),
            kept=left,
            inputs=tuple(self._inputs),
            operators=recorder.operators,
            reasons=tuple(reasons),
        )

    def _components(self, stage: str) -> list[str]:
        roles = {"encode": ENCODER_ROLES, "denoise": LOOPED_ROLES}
        return [part.name for part in self.facts.components if part.role in roles.get(stage, ("vae",))]

    @property
    def _vae(self) -> Any:
        return self.skeleton.modules.get("vae")

    @contextmanager
    def _inside(self, name: str) -> Iterator[None]:
        """Mark a component as working where its own forward is not what is called."""
        self.marks.write(Entered(name))
        yield
        self.marks.write(Left(name))

    def _ran(self, inputs: dict[str, Any]) -> dict[str, Any]:
        self._inputs.append(tuple(x.nbytes for x in tree_leaves(inputs) if isinstance(x, Tensor)))
        return inputs

    def _module(self, name: str) -> nn.Module:
        if name in self.skeleton.left_out:
            raise UnknownInputs(self.skeleton.left_out[name])
        return self.skeleton.modules[name]

    def _encode(self) -> Iterator[Any]:
        prompts = self.picture.batch_size
        found: list[Tensor] = []
        for part in self.facts.components:
            if part.role == "image_encoder":
                raise UnknownInputs("what its image encoder is called with is not known")
            if part.role != "text_encoder":
                continue
            module = self._module(part.name)
            start = len(self.recorder.events)
            output = module(**self._ran(text_inputs(module, part.name, self.pipe, prompts)))
            found.append(output.hidden_states[-2] if output.hidden_states else output.last_hidden_state)
            del output
            stop = len(self.recorder.events)
            for _ in range(self.facts.guidance_copies - 1):  # the negative prompt
                self.recorder.repeat(tuple(self.recorder.events[start:stop]), keep=True)
        # both halves of guidance in one tensor; the parts live on beside it
        yield found, [states.new_empty(self.facts.guidance_copies, *states.shape) for states in found]

    def _vae_encode(self) -> Iterator[Any]:
        vae = self._known_vae()
        with self._inside("vae"):
            size = (self.picture.batch_size, 3, self.picture.height, self.picture.width)
            picture = torch.empty(size, dtype=self._vae_dtype, device="meta")
            self._ran({"x": picture})
            latents = vae.encode(picture, return_dict=False)[0]
            latents = latents.mode() if hasattr(latents, "mode") else latents
        yield latents.to(self.dtype)

    def _denoise(self) -> Iterator[Any]:
        denoiser = self._module(self.facts.denoiser)
        call = Call(pipe=self.pipe, facts=self.facts, picture=self.picture, dtype=self.dtype)
        inputs = denoiser_inputs(denoiser, call)
        # latents, the model's last output and what the scheduler makes of both
        first = next(iter(inputs.values()))
        held = [first.new_empty(first.shape) for _ in range(2)]
        added = self._controlnets(inputs, call)
        output = denoiser(**self._ran({**inputs, **added}), return_dict=False)[0]
        yield held, inputs, output

    def _controlnets(self, inputs: dict[str, Any], call: Call) -> dict[str, Any]:
        controlnet = self.skeleton.modules.get("controlnet")
        if "controlnet" in self.skeleton.left_out:
            raise UnknownInputs(self.skeleton.left_out["controlnet"])
        if controlnet is None:
            return {}
        down: list[Tensor] = []
        middle: Tensor | None = None
        nets = networks_in(controlnet)
        for net in nets:
            given = self._ran(controlnet_inputs(net, inputs, call))
            more, last = net(**given, conditioning_scale=1.0, return_dict=False)
            down = list(more) if middle is None else [old + new for old, new in zip(down, more, strict=True)]
            middle = last if middle is None else middle + last
        return {"down_block_additional_residuals": tuple(down), "mid_block_additional_residual": middle}

    def _decode(self) -> Iterator[Any]:
        if self._vae is None and "vae" not in self.skeleton.left_out:
            return
        vae = self._known_vae()
        rows, columns = (-(-side // self.facts.vae_scale_factor) for side in (self.picture.height, self.picture.width))
        channels = vae.config.latent_channels
        latents = torch.empty(self.picture.batch_size, channels, rows, columns, dtype=self._vae_dtype, device="meta")
        with self._inside("vae"):
            scaled = latents / 1.0
            self._ran({"z": scaled})
            picture = vae.decode(scaled, return_dict=False)[0]
        yield picture, (picture * 0.5 + 0.5).clamp(0, 1)

    def _known_vae(self) -> Any:
        vae: Any = self._module("vae")
        if type(vae).__name__ not in VAES:
            raise UnknownInputs(f"what a {type(vae).__name__} is called with is not known")
        return vae

    @property
    def dtype(self) -> torch.dtype:
        """What the denoiser computes in."""
        return _dtype(self.skeleton.modules.get(self.facts.denoiser))

    @property
    def _vae_dtype(self) -> torch.dtype:
        return _dtype(self._vae)


def _dtype(module: nn.Module | None) -> torch.dtype:
    if module is None:
        return torch.float32
    return next((tensor.dtype for tensor in module.parameters() if tensor.is_floating_point()), torch.float32)


def widens_vae(pipe: Any) -> bool:
    """Whether the pipeline casts its VAE to float32 to work: a float16 one whose config asks for it."""
    vae = getattr(pipe, "vae", None)
    return vae is not None and upcasts_vae(pipe) and _dtype(vae) == torch.float16
