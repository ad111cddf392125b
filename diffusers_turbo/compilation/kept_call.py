"""The first kind of call of a compiled module: its code comes from disk without a trace, or is made to go there.

Any other call, and this one once the module is not what it was, goes the compiler's ordinary way, whose guards see to
it that the code is right.
"""

from __future__ import annotations

import logging
from typing import Any, Protocol

import torch
from torch import nn

from ..errors import in_one_line
from ..graphs.signature import MODE, Signature, flatten, signature_of
from ..graphs.watch import Watch, why_not_capturable
from ..modules import modules_in
from .garbage import rarely_collected
from .kept_code import KeptCode
from .looked_at import PLAIN

logger = logging.getLogger("diffusers_turbo")


class Shelf(Protocol):
    """Where the code of one module's calls lies on disk, of each signature in several variants."""

    def read(self, signature: str) -> list[bytes]:
        """Return what lies there for a signature and may be trusted, the newest first."""

    def write(self, signature: str, name: str, data: bytes) -> None:
        """Put a variant there, in the place of one of the same name; a failure is the shelf's to tell."""


class KeptCall:
    """Finds the code of a module's first call, and says at each call whether it is this call's."""

    def __init__(self, module: nn.Module, shelf: Shelf, *, mode: str | None) -> None:
        """Nothing is read before the first call; `mode` is torch.compile's."""
        self.module, self.shelf, self.mode = module, shelf, mode
        self.code: KeptCode | None = None
        self.made = False
        self.reason: str | None = None
        self._decided = False
        self._signature: tuple[Signature, tuple[Any, ...]] | None = None
        self._watch: _Watch | None = None
        self._look = True

    def look_again(self) -> None:
        """A call of the pipeline begins: the next call of the module looks at all of it."""
        self._look = True

    def code_for(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> KeptCode | None:
        """Return the code of a call, None where it goes the compiler's ordinary way."""
        if self._decided and self.code is None:
            return None
        signature = whole_signature(self.module, args, kwargs)
        if not self._decided:
            self._decided, self._signature = True, signature
            self._decide(args, kwargs)
        elif signature != self._signature or not self._is_as_it_was(args, kwargs):
            return None
        return self.code

    def give_up(self, why: str) -> None:
        """Go the compiler's way from now on."""
        self.code, self.reason = None, why

    def tell(self) -> list[str]:
        """Say where the code came from, or why there is none."""
        if self.reason is not None:
            return [f"{type(self.module).__name__}: traced in each process, since {self.reason}"]
        if self.code is None:
            return []
        how = "traced and compiled here, and kept" if self.made else "neither traced nor compiled: found on disk"
        return [f"{type(self.module).__name__}: {how}"]

    def _decide(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Find code for the first call, or make it."""
        found = "gradients are recorded" if torch.is_grad_enabled() else why_not_capturable(self.module)
        if self._signature is None or found:
            self.reason = found or "its arguments are more than tensors and plain values"
            return
        text = as_text(self._signature)
        with rarely_collected():
            self.code = self._read(text, args, kwargs) or self._make(text, args, kwargs)
        if self.code is not None:
            self._watch = _Watch(self.module)

    def _read(self, signature: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> KeptCode | None:
        for data in self.shelf.read(signature):
            try:
                code = KeptCode.from_bytes(data)
                reason = code.why_not(self.module, args, kwargs)
                if reason is None:
                    code.make_ready()
                    return code
            except Exception as error:  # another torch's pickle, a driver that refuses the code: each has its own type
                reason = in_one_line(error, 300)
            logger.info("%s: code on disk is of another call: %s", type(self.module).__name__, reason)
        return None

    def _make(self, signature: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> KeptCode | None:
        try:
            code = KeptCode.make(self.module, args, kwargs, self.mode)
        except Exception as error:  # what cannot be traced whole, not compiled, or not pickled: each has its own type
            self.reason = in_one_line(error, 300)
            return None
        self.made = True
        self.shelf.write(signature, code.name, code.to_bytes())
        code.make_ready()
        return code

    def _is_as_it_was(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the module is still what the code is of: looked at closely only when something changed."""
        assert self.code is not None
        assert self._watch is not None
        if self._watch.changed(everything=self._look):
            self._watch.fits = self.code.why_not(self.module, args, kwargs, files=False) is None
        self._look = False
        return self._watch.fits


class _Watch:
    """A module as it was when its code was last seen to fit it, or not to."""

    def __init__(self, module: nn.Module) -> None:
        self.fits = True
        self._watch = Watch(module)
        self._take()

    def _take(self) -> None:
        states = list(map(vars, modules_in(self._watch.root)))
        processors = (state["processor"] for state in states if "processor" in state)
        self._states = [*states, *(vars(one) for one in processors if hasattr(one, "__dict__"))]
        self._numbers, (self._plain, self._held) = self._watch.numbers(), self._attributes()

    def _attributes(self) -> tuple[list[Any], list[Any]]:
        """Return plain values, to be compared as such, and tuples and configs, which may hold what cannot be."""
        values = [value for state in self._states for value in state.values()]
        configs = [state["_internal_dict"] for state in self._states if "_internal_dict" in state]
        plain = [value for value in values if type(value) in _PLAIN]
        return plain, [*(value for value in values if type(value) is tuple), *configs]

    def _has_other_attributes(self) -> bool:
        plain, held = self._attributes()
        return plain != self._plain or list(map(id, held)) != list(map(id, self._held))

    def changed(self, *, everything: bool) -> bool:
        """Whether anything changed since last time; what a callback may change between two steps, or everything."""
        changed = self._watch.numbers() != self._numbers
        if everything:
            changed |= self._watch.changed() or self._has_other_attributes()
        if changed:
            self._take()
        return changed


_PLAIN = frozenset(PLAIN)


def whole_signature(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Signature, tuple[Any, ...]] | None:
    """Return what a call's code depends on beside the module, None where that is unknown."""
    leaves, structure = flatten(args, kwargs)
    device = next(module.parameters()).device
    signature = signature_of(leaves, structure, device, vars(module).get(MODE))
    process = (torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_default_device(), device)
    return None if signature is None else (signature, process)


def as_text(signature: tuple[Signature, tuple[Any, ...]]) -> str:
    """Return a signature as the same text in every process."""
    call, process = signature
    return f"{call.structure} {call.leaves} {call.modes} {process}"
