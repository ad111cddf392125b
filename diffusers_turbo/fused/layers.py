"""Layers whose forward is a fused kernel where it takes the input, and the same formula in plain PyTorch elsewhere.

Called as its host calls it, each means what it always meant. What more a kernel can do (SiLU after a norm, an addition
before it) is asked for by keywords, which only this package's blocks and tails give.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..kernels.base import Place
from ..kernels.bias_residual import bias_residual_launch
from ..kernels.geglu import geglu_launch
from ..kernels.group_norm import HELD_SLOTS, SINGLE_SLOTS, group_norm_launch
from ..kernels.linear_geglu import PERSISTENT, SINGLE, linear_geglu_misfits
from ..kernels.registry import KERNELS
from .rehearsal import Rehearsal

STAND_IN = "_turbo_stand_in"
"""Where a module keeps what stands in for its forward, beside the forward itself, which hooks may wrap."""

HOOKS = ("_hf_hook", "_diffusers_hook")
"""What accelerate's and diffusers' hooks set on a module whose forward they wrap."""


Variant = tuple[tuple[Any, ...], tuple[Any, ...], dict[str, Any]]
"""What tells a variant from others of its kernel; arguments and options of a launch of it on a few elements."""


@dataclass(eq=False)
class FusedForward:
    """Stands in for the forward of one module.

    Attributes:
        module: whose forward it is.
        label: its place in the pipeline, for the report.
        places: where the kernel can run, as found when this was made.
        refused: why the last call ran in plain PyTorch; empty when the kernel ran, None before the first call.
    """

    kernel: ClassVar[str]
    instead: ClassVar[str] = "in plain PyTorch"
    """How the work is done where the kernel cannot."""

    module: Any
    label: str
    places: frozenset[Place]
    refused: tuple[str, ...] | None = None

    def runs_on(self, x: Tensor) -> bool:
        """Whether the kernel runs on the device of a tensor, in its dtype."""
        return (x.device.type, x.dtype) in self.places

    def rehearsals(self) -> Iterator[Rehearsal]:
        """Launches on a few elements, one of each variant that this layer's calls may need; none off its places."""
        weight = self._weight()
        if weight is not None and self.runs_on(weight):
            for variant, arguments, options in self._variants(weight):
                key = (self.kernel, weight.device, weight.dtype, *variant)
                yield Rehearsal(key, partial(KERNELS[self.kernel].run, *arguments, **options))

    def _weight(self) -> Tensor | None:
        found: Tensor | None = getattr(self.module, "weight", None)
        return found

    def _variants(self, weight: Tensor) -> Iterator[Variant]:
        """The variants that this layer's calls may need."""
        raise NotImplementedError

    def run(self, x: Tensor, *arguments: Any, **options: Any) -> Any:
        """Run the kernel, or its plain equal where it cannot take these tensors."""
        kernel = KERNELS[self.kernel]
        if self.runs_on(x):
            refused = kernel.misfits(x, *arguments, **options)
        else:
            refused = [f"it does not take {x.dtype} on {x.device.type} here"]
        self.refused = tuple(refused)
        return (kernel.plain if refused else kernel.run)(x, *arguments, **options)


class FusedGroupNorm(FusedForward):
    """`nn.GroupNorm`; SiLU, and what to add to the input, `[B, C]` and `[C]`, are the caller's to ask for."""

    kernel = "group_norm"

    def __call__(
        self, input: Tensor, silu: bool = False, add: Tensor | None = None, before: Tensor | None = None
    ) -> Tensor:
        """Normalise `[B, C, ..]`; the argument's name is the host's."""
        norm = self.module
        affine = (norm.num_groups, norm.weight, norm.bias, norm.eps)
        result: Tensor = self.run(input, *affine, silu=silu, add=add, before=before)
        return result

    def _variants(self, weight: Tensor) -> Iterator[Variant]:
        norm = self.module
        x, width = _few(weight, norm.num_channels), norm.num_channels // norm.num_groups
        arguments = (x, norm.num_groups, norm.weight, norm.bias, norm.eps)
        launch = group_norm_launch(norm.num_channels, 1, norm.num_groups)
        yield ("split", launch.columns), arguments, {"launch": replace(launch, split=True)}
        if not self.label.startswith("vae."):  # whose groups are too large for one program
            for slots in (*HELD_SLOTS, SINGLE_SLOTS):
                launch = group_norm_launch(norm.num_channels, max(slots // width, 1), norm.num_groups)
                yield ("single", width, launch.held, launch.block), arguments, {"launch": launch}

    def takes_bias_of(self, conv: Any, x: Tensor) -> bool:
        """Whether `conv` may be called on `[B, C, H, W]` without its bias, which then goes into this norm."""
        plain = type(conv) is nn.Conv2d and conv.bias is not None and "forward" not in vars(conv) and unwatched(conv)
        fits = self.runs_on(x) and channels_last(x) and channels_last(conv.weight)
        return plain and fits and not torch.is_grad_enabled()

    def laid_out(self, x: Tensor, conv: Any) -> Tensor:
        """Give `[B, C, H, W]` the layout of the convolution that comes next, which would have to copy it otherwise.

        Transformers with linear projections (SD2, SDXL) leave their images with the channels outermost.
        """
        if self.runs_on(x) and channels_last(conv.weight):
            return x.contiguous(memory_format=torch.channels_last)
        return x


@dataclass(eq=False)
class FusedGroupNormSiLU(FusedGroupNorm):
    """A GroupNorm with the SiLU that its host applies next; `SiLUDone` then stands where that was.

    Attributes:
        conv: what comes after the SiLU.
    """

    conv: Any = None

    def __call__(self, input: Tensor) -> Tensor:  # type: ignore[override]
        """Normalise `[B, C, H, W]` and apply SiLU."""
        return super().__call__(self.laid_out(input, self.conv), silu=True)


@dataclass(eq=False)
class SiLUDone:
    """Stands in for the SiLU after a norm that does it, as long as that norm is the host's and does."""

    module: Any
    host: Any
    norm: str

    def __call__(self, input: Tensor) -> Tensor:
        """Hand the activations on."""
        if isinstance(stand_in(getattr(self.host, self.norm)), FusedGroupNormSiLU):
            return input
        result: Tensor = type(self.module).forward(self.module, input)
        return result


class FusedLayerNorm(FusedForward):
    """`nn.LayerNorm`; with a residual, of the sum of the two, which is returned as well."""

    kernel = "add_layer_norm"

    def __call__(self, input: Tensor, residual: Tensor | None = None) -> Any:
        """Normalise `[.., D]`, or return the sum with `residual` and its norm."""
        norm = self.module
        added, normed = self.run(input, residual, norm.weight, norm.bias, norm.eps)
        return normed if residual is None else (added, normed)

    def _variants(self, weight: Tensor) -> Iterator[Variant]:
        norm, x = self.module, weight.new_zeros(1, len(weight))
        yield (len(weight),), (x, x, norm.weight, norm.bias, norm.eps), {}


class FusedGEGLU(FusedForward):
    """The feed-forward's projection (an adapter's too), then `value * gelu(gate)` in one pass."""

    kernel = "geglu"

    def _weight(self) -> Tensor | None:
        found: Tensor | None = getattr(self.module.proj, "weight", None)
        return found

    def _variants(self, weight: Tensor) -> Iterator[Variant]:
        yield astuple(geglu_launch(len(weight) // 2)), (weight.new_zeros(1, len(weight)),), {}

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Project `[.., D]` to `[.., 2M]` and halve it to `[.., M]`."""
        if args or kwargs:
            result: Tensor = type(self.module).forward(self.module, hidden_states, *args, **kwargs)
        else:
            result = self.run(self.module.proj(hidden_states))
        return result


@dataclass(eq=False)
class FusedLinearGEGLU(FusedForward):
    """The feed-forward's projection and `value * gelu(gate)` in one kernel.

    Attributes:
        otherwise: what does the work where that kernel cannot: after an adapter's projection, say.
    """

    kernel = "linear_geglu"
    instead = "as a projection and what comes after it"

    otherwise: Any = None

    def _weight(self) -> Tensor | None:
        found: Tensor | None = getattr(self.module.proj, "weight", None)
        return found

    def _variants(self, weight: Tensor) -> Iterator[Variant]:
        x, bias = weight.new_zeros(1, weight.shape[-1]), self.module.proj.bias
        with torch.no_grad():
            fits = not linear_geglu_misfits(x, weight, bias)
        if fits:
            for launch in (PERSISTENT, SINGLE):
                yield (weight.shape[-1], bias is None, launch), (x, weight, bias), {"launch": launch}

    def rehearsals(self) -> Iterator[Rehearsal]:
        """Return its own, and those of what does the work otherwise."""
        yield from super().rehearsals()
        if self.otherwise is not None:
            yield from self.otherwise.rehearsals()

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Project `[.., D]` to `[.., 2M]` and halve it to `[.., M]`."""
        proj = self.module.proj
        if self.runs_on(hidden_states):
            refused = self._unusual(hidden_states, bool(args or kwargs))
            refused = refused or KERNELS[self.kernel].misfits(hidden_states, proj.weight, proj.bias)
        else:
            refused = [f"it does not take {hidden_states.dtype} on {hidden_states.device.type} here"]
        self.refused = tuple(refused)
        if not refused:
            result: Tensor = KERNELS[self.kernel].run(hidden_states, proj.weight, proj.bias)
        elif self.otherwise is not None:
            result = self.otherwise(hidden_states, *args, **kwargs)
        else:
            result = type(self.module).forward(self.module, hidden_states, *args, **kwargs)
        return result

    def _unusual(self, x: Tensor, more: bool) -> list[str]:
        """Why the projection must be called as the module that it is."""
        proj = self.module.proj
        if type(proj) is not nn.Linear or "forward" in vars(proj) or not unwatched(proj):
            return [f"its projection is not a plain nn.Linear ({type(proj).__name__})"]
        if not has_plain_weights(proj):
            return [f"its weight is a {type(proj.weight).__name__}"]
        if torch.is_autocast_enabled(x.device.type):
            return ["autocast chooses the dtype of the projection"]
        return ["it is given more than its input"] if more else []


class FusedConv(FusedForward):
    """`nn.Conv2d`; with a residual, their sum, bias and residual added in one pass."""

    kernel = "bias_residual"

    def __call__(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Convolve `[B, C, H, W]`; the argument's name is the host's."""
        conv = self.module
        if residual is None:
            host_result: Tensor = type(conv).forward(conv, input)
            return host_result
        # the residual has the shape and layout that the result will have, and what does not fit keeps its bits
        if not self.runs_on(input) or not channels_last(conv.weight):
            self.refused = (f"it does not take {input.dtype} on {input.device.type} here, or not this layout",)
        else:
            self.refused = tuple(KERNELS[self.kernel].misfits(residual, residual, conv.bias))
        if self.refused:
            result: Tensor = residual + type(conv).forward(conv, input)
        else:
            result = self.run(without_bias(conv, input), residual, conv.bias)
        return result

    def _variants(self, weight: Tensor) -> Iterator[Variant]:
        x = _few(weight, len(weight))
        yield astuple(bias_residual_launch(len(weight))), (x, x, self.module.bias), {}


def _few(like: Tensor, channels: int) -> Tensor:
    """A picture of four positions, channels innermost."""
    return like.new_zeros(1, 2, 2, channels).movedim(-1, 1)


def without_bias(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Convolve `[B, C, H, W]` and leave the bias to somebody else."""
    result: Tensor = conv._conv_forward(x, conv.weight, None)
    return result


def unwatched(module: nn.Module) -> bool:
    """Whether nobody looks at what the module is called with and returns."""
    return not (module._forward_hooks or module._forward_pre_hooks)


def stand_in(module: nn.Module) -> Any:
    """Return what stands in for the forward of `module`, under offload hooks too; None without one, or no longer."""
    own = vars(module)
    ours = own.get(STAND_IN)
    # hooks call the forward they found, and not every version of them tells which that is
    return ours if own.get("forward") is ours or is_offloaded(module) else None


def is_offloaded(module: nn.Module) -> bool:
    """Whether one of `HOOKS` hangs on a module itself."""
    return any(name in vars(module) for name in HOOKS)


def has_plain_weights(layer: Any) -> bool:
    """Whether weight and bias are tensors that a kernel can read: a quantised one needs its layer."""
    return all(x is None or type(x) in (nn.Parameter, Tensor) for x in (layer.weight, layer.bias))


def channels_last(x: Tensor) -> bool:
    """Whether `[B, C, H, W]` lies in memory with its channels innermost."""
    return x.is_contiguous(memory_format=torch.channels_last)
