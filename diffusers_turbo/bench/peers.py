"""Other accelerators, each applied to an ordinary diffusers pipeline the way its own documentation says.

None of them is a dependency: `missing()` says what is not installed, `apply()` raises it. Nothing of them is imported
before it is applied.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module, metadata
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ..errors import MissingPackageError, NotSupportedError, explain_failure
from ..facts.pipeline import execution_device

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Peer:
    """One accelerator, with its settings.

    Attributes:
        name: how cases call it.
        description: what it does, in one line.
        package: its distribution, None for a recipe that needs torch and diffusers only.
        version: the release these settings were written for.
        modules: what has to be importable.
        extra_packages: further distributions to install with it.
        needs_gpu: whether it does nothing useful without a GPU.
        needs_unet: whether it knows UNets only.
        offloads: whether it moves the weights, and so begins with a pipeline in host memory.
        takes_budget: whether it has a setting for the memory it may take.
        lossy_reason: what changes in the picture beyond rounding, None for nothing.
        source: the page that its settings are from.
        use: throws it on a pipeline; what offloads is also told the device and the bytes it may take there.
    """

    name: str
    description: str
    package: str | None = None
    version: str | None = None
    modules: tuple[str, ...] = ()
    extra_packages: tuple[str, ...] = ()
    needs_gpu: bool = False
    needs_unet: bool = False
    offloads: bool = False
    takes_budget: bool = False
    lossy_reason: str | None = None
    source: str
    use: Callable[..., None]

    def missing(self) -> str | None:
        """Return why it cannot be used here, None when all its packages are installed."""
        absent = [name for name in self.modules if find_spec(name) is None]
        return f"{' and '.join(absent)} not installed" if absent else None

    def installed_version(self) -> str | None:
        """Return the version that is installed, None for none and for a recipe without a package."""
        try:
            return metadata.version(self.package) if self.package else None
        except metadata.PackageNotFoundError:
            return None

    def apply(self, pipe: Any, *, device: torch.device | None = None, budget_bytes: int | None = None) -> None:
        """Apply it to a pipeline in place. There is no way back: load the pipeline anew instead.

        Args:
            pipe: the pipeline; one in host memory stays there until it is called, if the peer offloads.
            device: where an offloader is to compute, None for where the pipeline does.
            budget_bytes: the memory it may take there, None for what it takes by itself.

        Raises:
            MissingPackageError: a package of it is not installed, or does not import here.
            NotSupportedError: it needs a GPU, or a UNet, and there is none; or it knows no budget.
        """
        tried, install = f"peer {self.name}", f"pip install {' '.join(self._requirements())}"
        if (reason := self.missing()) is not None:
            raise MissingPackageError(explain_failure(tried, reason, " and ".join(self._requirements()), install))
        if self.needs_unet and getattr(pipe, "unet", None) is None:
            found = f"{type(pipe).__name__} without a `unet`"
            raise NotSupportedError(explain_failure(tried, found, "a pipeline with a UNet", "leave it out"))
        if self.needs_gpu and (device := device or execution_device(pipe)).type == "cpu":
            found = f"{type(pipe).__name__} on the CPU"
            raise NotSupportedError(explain_failure(tried, found, "a GPU", "move the pipeline, or leave it out"))
        if budget_bytes is not None and not self.takes_budget:
            needed = f"one of {', '.join(peer.name for peer in PEERS.values() if peer.takes_budget)}"
            raise NotSupportedError(explain_failure(tried, "a budget", needed, "leave out `budget_bytes`"))
        try:
            if self.offloads:
                self.use(pipe, device, budget_bytes)
            else:
                self.use(pipe)
        except ImportError as error:
            found = f"{type(error).__name__}: {error}"
            raise MissingPackageError(explain_failure(tried, found, "a version that imports here", install)) from error

    def _requirements(self) -> tuple[str, ...]:
        pinned = f"{self.package}=={self.version}" if self.version else self.package
        return (pinned, *self.extra_packages) if pinned else self.extra_packages


def _deepcache(pipe: Any) -> None:
    helper = import_module("DeepCache").DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=3, cache_branch_id=0)
    helper.enable()


def _tomesd(pipe: Any) -> None:
    import_module("tomesd").apply_patch(pipe, ratio=0.5)


_MMGP_SHARE = 0.8
"""Of the memory there is, what models may take: the default of mmgp's `vram_safety_coefficient`."""


def _mmgp(pipe: Any, _: torch.device, budget_bytes: int | None) -> None:
    import torch

    # It finds the device itself and wants every weight in host memory first.
    pipe.to("cpu")
    mmgp = import_module("mmgp")
    offload = import_module("mmgp.offload")
    # In MB, what a model may take; a larger one comes in parts. Its profile says 3000, whatever the card.
    settings = {} if budget_bytes is None else {"budgets": int(_MMGP_SHARE * budget_bytes / 2**20)}
    # Its profiles quantise transformers by default; here the offloading alone is compared.
    settings |= {"quantizeTransformer": False, "verboseLevel": 0}
    try:
        offload.profile(pipe, mmgp.profile_type.LowRAM_LowVRAM, **settings)
    finally:
        # It leaves "cuda" as the whole process's default, on which schedulers of other pipelines cannot be made.
        torch.set_default_device(None)


def _diffusers_mm(pipe: Any, device: torch.device, _: int | None) -> None:
    pipe.to("cpu")
    import_module("diffusers_mm").managed(pipe, device=device)


def _diffusion_fast(pipe: Any) -> None:
    import torch
    from torch._inductor import list_mode_options

    # The recipe sets these flags for the whole process; as options of one compilation they reach no other case.
    options: dict[str, Any] = {
        **list_mode_options("max-autotune"),
        "conv_1x1_as_mm": True,
        "coordinate_descent_tuning": True,
        "epilogue_fusion": False,
        "coordinate_descent_check_all_directions": True,
    }
    if hasattr(pipe, "fuse_qkv_projections"):
        pipe.fuse_qkv_projections()
    denoiser = "unet" if getattr(pipe, "unet", None) is not None else "transformer"
    for name in (denoiser, "vae"):
        getattr(pipe, name).to(memory_format=torch.channels_last)
    setattr(pipe, denoiser, torch.compile(getattr(pipe, denoiser), fullgraph=True, options=options))
    pipe.vae.decode = torch.compile(pipe.vae.decode, fullgraph=True, options=options)


def _bare(compiled: bool) -> Callable[[Any], None]:
    def use(pipe: Any) -> None:
        from .bare import make_bare

        make_bare(pipe, compiled=compiled)

    return use


PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer(
            name="diffusion-fast",
            description="fused projections, channels-last, UNet and VAE decoder compiled with max-autotune",
            source="https://github.com/huggingface/diffusion-fast",
            use=_diffusion_fast,
        ),
        Peer(
            name="bare",
            description="torch.compile's default and channels-last, UNet and VAE decoder one CUDA graph each",
            needs_gpu=True,
            needs_unet=True,
            source="https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs",
            use=_bare(compiled=True),
        ),
        Peer(
            name="bare-eager",
            description="channels-last, UNet and VAE decoder one CUDA graph each, no compiler",
            needs_gpu=True,
            needs_unet=True,
            source="https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs",
            use=_bare(compiled=False),
        ),
        Peer(
            name="deepcache",
            description="deep features of the UNet computed every third step, reused in between",
            package="DeepCache",
            version="0.1.1",
            modules=("DeepCache",),
            needs_unet=True,
            lossy_reason="two of three steps reuse the deep features of an earlier step",
            source="https://github.com/horseee/DeepCache",
            use=_deepcache,
        ),
        Peer(
            name="tomesd",
            description="half of the tokens merged before self-attention at the highest resolution",
            package="tomesd",
            version="0.1.3",
            modules=("tomesd",),
            needs_unet=True,
            lossy_reason="merged tokens share one output",
            source="https://github.com/dbolya/tomesd",
            use=_tomesd,
        ),
        Peer(
            name="mmgp",
            description="components streamed to the GPU in parts, its profile LowRAM_LowVRAM, not quantised",
            package="mmgp",
            version="3.8.2",
            modules=("mmgp", "optimum", "psutil"),
            extra_packages=("optimum-quanto", "psutil"),
            needs_gpu=True,
            offloads=True,
            takes_budget=True,
            source="https://github.com/deepbeepmeep/mmgp",
            use=_mmgp,
        ),
        Peer(
            name="diffusers-mm",
            description="offloading chosen by the size of the components and the free memory",
            package="diffusers-mm",
            version="0.4.0",
            modules=("diffusers_mm", "psutil"),
            extra_packages=("psutil",),
            needs_gpu=True,
            offloads=True,
            source="https://github.com/asomoza/diffusers-mm",
            use=_diffusers_mm,
        ),
    )
}
"""Every peer by its name."""
