"""What a pipeline is made of: `PipelineFacts`, read once and then plain data that plans are made from."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import NotSupportedError, explain_failure
from .architecture import (
    AttentionFacts,
    DenoiserShape,
    VAEFacts,
    read_attention,
    read_denoiser_shape,
    read_vae,
)
from .components import ComponentFacts, read_component

if TYPE_CHECKING:
    import torch

DENOISERS = ("unet", "transformer", "prior")
"""The attributes under which diffusers' pipelines keep their denoiser, in the order in which they are looked for."""


@dataclass(frozen=True, kw_only=True)
class PipelineFacts:
    """What is true of one pipeline.

    Attributes:
        class_name: the pipeline's class.
        denoiser: the attribute that holds the denoiser: "unet", "transformer" or "prior".
        family: "sd15", "sd21", "sdxl", "unet" or "transformer", guessed from the denoiser's config.
        native_dtype: the 16-bit dtype the model was made for: float16 for UNets, bfloat16 for transformers.
        components: every torch module of the pipeline.
        shape: the denoiser's widths and levels, for estimates.
        vae: the autoencoder's facts, None where there is none.
        attention: attention layers of denoiser and VAE, alike ones counted together.
        default_height, default_width: pixels when the caller names none.
        vae_scale_factor: pixels per latent.
        size_multiple: what height and width must be multiples of.
        guidance_copies: samples the denoiser sees per picture: 2 with classifier-free guidance.
        scheduler: the scheduler's class.
        adapters: names of loaded LoRA adapters.
        ip_adapter: whether IP-Adapter weights are loaded.
        controlnet: whether there is a ControlNet.
        processors: attention processors in force in the denoiser: class name -> layers.
    """

    class_name: str
    denoiser: str
    family: str
    native_dtype: str
    components: tuple[ComponentFacts, ...]
    shape: DenoiserShape
    vae: VAEFacts | None = None
    attention: tuple[AttentionFacts, ...] = ()
    default_height: int = 512
    default_width: int = 512
    vae_scale_factor: int = 8
    size_multiple: int = 8
    guidance_copies: int = 2
    scheduler: str | None = None
    adapters: tuple[str, ...] = ()
    ip_adapter: bool = False
    controlnet: bool = False
    processors: Mapping[str, int] = field(default_factory=dict)

    def component(self, name: str) -> ComponentFacts | None:
        """Return the component of this attribute name, None where there is none."""
        return next((item for item in self.components if item.name == name), None)

    @property
    def denoiser_facts(self) -> ComponentFacts:
        """The denoiser's component."""
        found = self.component(self.denoiser)
        assert found is not None, "read_pipeline never makes facts without the denoiser's component"
        return found

    @property
    def parameter_bytes(self) -> int:
        """All components' weights."""
        return sum(item.parameter_bytes for item in self.components)

    @property
    def hooks(self) -> tuple[str, ...]:
        """Offload hooks on any component."""
        return tuple(sorted({hook for item in self.components for hook in item.hooks}))

    @property
    def compiled(self) -> tuple[str, ...]:
        """Names of the components that are compiled already."""
        return tuple(item.name for item in self.components if item.compiled)

    @property
    def refusals(self) -> tuple[str, ...]:
        """Why switches that touch weights must refuse, one reason per component."""
        return tuple(reason for item in self.components if (reason := item.refusal))

    def as_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)

    def to_json(self, *, indent: int | None = 2) -> str:
        """Return `as_dict` as JSON text."""
        return json.dumps(self.as_dict(), indent=indent)


def require_pipeline(pipe: Any, tried: str) -> str:
    """Return the attribute that holds the pipeline's denoiser, or refuse in the name of the call that was `tried`.

    Raises:
        NotSupportedError: not a diffusers pipeline, or one without a denoiser.
    """
    from diffusers import DiffusionPipeline

    if not isinstance(pipe, DiffusionPipeline):
        raise NotSupportedError(
            explain_failure(
                tried,
                f"an object of type {type(pipe).__name__}",
                "a diffusers pipeline with a unet or a transformer",
                "load one with DiffusionPipeline.from_pretrained(...) and pass that",
            )
        )
    modules = _modules(pipe)
    denoiser = next((name for name in DENOISERS if name in modules), None)
    if denoiser is None:
        raise NotSupportedError(
            explain_failure(
                f"{tried} on {type(pipe).__name__}",
                f"no denoiser among its components ({', '.join(modules) or 'no torch module at all'})",
                f"a component named {', '.join(DENOISERS[:-1])} or {DENOISERS[-1]}",
                "pass the pipeline that makes the pictures, with its denoiser loaded",
            )
        )
    return denoiser


def execution_device(pipe: Any) -> torch.device:
    """Return the device the pipeline computes on, which for an offloaded one is not where its weights lie.

    Weights on the meta device compute nowhere; the CPU is named for them.
    """
    import torch

    device = torch.device(pipe._execution_device)
    return torch.device("cpu") if device.type == "meta" else device


def device_without_hooks(pipe: Any) -> torch.device | None:
    """Return where a pipeline computes; None where hooks that move weights are to be asked for it.

    `DiffusionPipeline._execution_device` comes to the same, but asks every module of every component for two attributes
    that none has: 25 ms for SD1.5 and 29 for SDXL on one slow core, before anything runs. Where all components begin on
    one accelerator, hooks below them would bring weights there and nowhere else.
    """
    import torch

    from ..modules import hooked_in, is_hooked

    roots = list(_modules(pipe).values())
    first = (next(itertools.chain(root.parameters(), root.buffers()), None) for root in roots)
    places = [tensor.device for tensor in first if tensor is not None]
    accelerators = [place for place in places if place.type not in ("cpu", "meta")]
    together = len(accelerators) == len(places) and len(set(places)) == 1
    if any(map(is_hooked if together else hooked_in, roots)):
        return None
    # of components on several devices, the accelerator counts
    return (*accelerators, *places, torch.device("cpu"))[0]


def read_pipeline(pipe: Any) -> PipelineFacts:
    """Read a diffusers pipeline's facts. Reads only: nothing on the pipeline changes and nothing is computed.

    Raises:
        NotSupportedError: not a diffusers pipeline, or one without a denoiser.
    """
    denoiser = require_pipeline(pipe, "reading the pipeline")
    modules = _modules(pipe)
    module = modules[denoiser]
    shape = read_denoiser_shape(module)
    vae = read_vae(modules["vae"], upcasts=heeds_force_upcast(pipe)) if "vae" in modules else None
    scale = _vae_scale_factor(pipe, vae)
    processors = _count_processors(module)
    # Flux's transformer works at any size, and its pipeline names one
    sample_size = shape.sample_size or getattr(pipe, "default_sample_size", None)
    side = sample_size * scale if isinstance(sample_size, int) else 512
    return PipelineFacts(
        class_name=type(pipe).__name__,
        denoiser=denoiser,
        family=_family(shape),
        # the published weights: SD 1.x, 2.x and XL ship fp16 variants, transformers from PixArt on bf16
        native_dtype="float16" if shape.kind == "unet" else "bfloat16",
        components=tuple(read_component(name, _role(name, denoiser), part) for name, part in modules.items()),
        shape=shape,
        vae=vae,
        attention=(
            *read_attention(denoiser, module),
            *(read_attention("vae", modules["vae"]) if vae is not None else ()),
        ),
        default_height=side,
        default_width=side,
        vae_scale_factor=scale,
        size_multiple=scale * shape.patch_size,
        guidance_copies=1 if shape.distilled_guidance or not shape.text_conditioned else 2,
        scheduler=type(pipe.scheduler).__name__ if getattr(pipe, "scheduler", None) is not None else None,
        adapters=tuple(sorted(getattr(module, "peft_config", None) or {})),
        ip_adapter=_has_ip_adapter(module, processors),
        controlnet="controlnet" in modules,
        processors=processors,
    )


def heeds_force_upcast(pipe: Any) -> bool:
    """Whether the pipeline decodes in float32 when its VAE's config asks for that.

    The flag is True in the configs of many VAEs (it is the class's default), and read by SDXL's pipelines and the
    upscaler only: those that have the method for it.
    """
    return hasattr(pipe, "upcast_vae")


def upcasts_vae(pipe: Any) -> bool:
    """Whether the pipeline casts the weights of its 16-bit VAE to float32 to decode, and back."""
    config = getattr(getattr(pipe, "vae", None), "config", None)
    return heeds_force_upcast(pipe) and bool(getattr(config, "force_upcast", False))


def _modules(pipe: Any) -> dict[str, torch.nn.Module]:
    import torch

    return {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}


def _role(name: str, denoiser: str) -> str:
    if name == denoiser:
        return "denoiser"
    for role in ("vae", "text_encoder", "image_encoder", "controlnet"):
        if name.startswith(role):
            return role
    return "other"


def _vae_scale_factor(pipe: Any, vae: VAEFacts | None) -> int:
    if vae is not None and vae.block_out_channels:
        return int(2 ** (len(vae.block_out_channels) - 1))
    named = getattr(pipe, "vae_scale_factor", None)
    return named if isinstance(named, int) else 1


def _count_processors(module: Any) -> dict[str, int]:
    counts: dict[str, int] = {}
    for processor in (getattr(module, "attn_processors", None) or {}).values():
        name = type(processor).__name__
        counts[name] = counts.get(name, 0) + 1
    return counts


def _has_ip_adapter(module: Any, processors: Mapping[str, int]) -> bool:
    projection = type(getattr(module, "encoder_hid_proj", None)).__name__
    return projection == "MultiIPAdapterImageProjection" or any("IPAdapter" in name for name in processors)


def _family(shape: DenoiserShape) -> str:
    """Guess the model family from the config: names of checkpoints say nothing reliable."""
    if shape.kind == "transformer":
        return "transformer"
    if shape.added_text_time:
        return "sdxl"
    return {768: "sd15", 1024: "sd21"}.get(shape.cross_attention_dim or 0, "unet")
