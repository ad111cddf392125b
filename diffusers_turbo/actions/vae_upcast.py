"""A float32 copy of the VAE's weights beside the 16-bit ones, for pipelines that decode in float32.

SDXL's VAE overflows in float16, so its pipelines cast all of it to float32 before each decode and back after it. That
takes time, and gives the weights new addresses, which a CUDA graph of the decoder does not outlive. Here both casts
exchange pointers with a copy that stays. The values are those of the casts, to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import NotSupportedError, explain_failure
from ..facts.pipeline import upcasts_vae
from ..modules import is_hooked
from ..planning.options import VAEUpcastCopy
from .components import component, require_plain_weights
from .undo import ABSENT, Journal, journaling, owned, put

TRIED = "enable_vae_upcast_copy()"
HALVES = (torch.float16, torch.bfloat16)


@dataclass
class Wide:
    """The float32 copy of one weight, and where and in which version it was copied from."""

    values: Tensor
    source: tuple[int, int] | None = None

    def follow(self, half: Tensor, version: int) -> bool:
        """Take the values of `half` over unless they are there; return whether that was needed."""
        source = (half.data_ptr(), version)
        if stale := self.source != source:
            self.values.copy_(half)
            self.source = source
        return stale


@dataclass
class UpcastCopy:
    """Stands in for a VAE's `to` during calls of the pipeline; also the scope that puts it there."""

    vae: nn.Module
    copies: list[Wide] = field(default_factory=list)
    half: list[Tensor] = field(default_factory=list)
    cast: int = 0

    def __call__(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Cast as `nn.Module.to` does, by exchanging pointers where the cast is from half to float32 or back."""
        device, dtype, _, layout = torch._C._nn._parse_to(*args, **kwargs)
        moves = device is not None and any(weight.device != device for weight in self._weights())
        dtypes = {weight.dtype for weight in self._weights()}
        if not moves and layout is None and len(dtypes) == 1:
            now = dtypes.pop()
            if now in HALVES and dtype == torch.float32:
                self._widen()
                return self.vae
            if self.half and dtype == self.half[0].dtype:
                self.narrow()
                return self.vae
        self.narrow()
        type(self.vae).to(self.vae, *args, **kwargs)
        return self.vae

    def _weights(self) -> list[Tensor]:
        return [*self.vae.parameters(), *(buffer for buffer in self.vae.buffers() if buffer.is_floating_point())]

    def _widen(self) -> None:
        weights = self._weights()
        self.half = [weight.data for weight in weights]
        if [_placed(wide.values) for wide in self.copies] != [_placed(half) for half in self.half]:
            self.copies = [Wide(torch.empty_like(half, dtype=torch.float32)) for half in self.half]
        for weight, half, wide in zip(weights, self.half, self.copies, strict=True):
            self.cast += wide.follow(half, weight._version)
            weight.data = wide.values

    def narrow(self) -> None:
        """Give the VAE its 16-bit weights back, if it has the copies now."""
        half, self.half = self.half, []
        for weight, original in zip(self._weights(), half, strict=False):
            weight.data = original

    @contextmanager
    def around_call(self, pipe: Any) -> Iterator[None]:
        """Stand in for `to` inside the block."""
        if owned(self.vae, "to") is not ABSENT or is_hooked(self.vae):
            yield  # somebody moves the weights
            return
        put(self.vae, "to", self)
        try:
            yield
        finally:
            self.narrow()
            put(self.vae, "to", ABSENT)

    def revert(self) -> str | None:
        """Let go of the copies; in the middle of a decode the VAE is then cast as the pipeline would have cast it."""
        widened = bool(self.half)
        self.narrow()
        self.copies = []
        if owned(self.vae, "to") is self:
            put(self.vae, "to", ABSENT)
            if widened:
                self.vae.to(torch.float32)
        return None

    def tell(self) -> list[str]:
        """Say what the copies take, and how often they had to be made."""
        size = sum(wide.values.nbytes for wide in self.copies)
        return [f"{size / 2**20:.0f} MiB of float32 weights; {self.cast} casts of one weight so far"]

    def __getstate__(self) -> dict[str, Any]:
        """Leave the copies behind."""
        return {**vars(self), "copies": [], "half": []}


def _placed(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.device


def apply(pipe: Any, options: VAEUpcastCopy) -> Journal:
    """Exact: keep a float32 copy of the VAE's weights, for pipelines that decode in float32."""
    vae = component(pipe, "vae", TRIED)
    require_plain_weights(pipe, TRIED)
    dtypes = {weight.dtype for weight in vae.parameters()}
    if not upcasts_vae(pipe) or not dtypes <= set(HALVES):
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        found = f"a {type(pipe).__name__} whose VAE ({names}) is not cast for decoding"
        needed = "a pipeline such as SDXL's, in half precision, whose VAE's config has force_upcast"
        raise NotSupportedError(explain_failure(TRIED, found, needed, "leave this switch off"))
    if any(map(is_hooked, vae.modules())):
        found = "offload hooks on the VAE, which move its weights"
        raise NotSupportedError(
            explain_failure(TRIED, found, "a VAE that stays where it is", "disable_offload() first")
        )
    with journaling() as journal:
        change = UpcastCopy(vae)
        journal.add(change)
        journal.scopes.append(change)
    return journal
