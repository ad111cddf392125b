"""torch.compile in place: class, state-dict keys, LoRA and saving keep working, and it can be taken off again.

`nn.Module.compile()` hangs the compiled call on the module itself, where `torch.compile(module)` would put another
class in its place that diffusers' `isinstance` checks then skip.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from ..compilation.call import WatchedCall, tell_of
from ..errors import NotSupportedError, explain_failure
from .calls import COMPILED
from .compile_cache import CompileOptions, KeptOnDisk
from .components import component
from .undo import Journal, journaling

LOWEST_SM = (7, 0)
"""Inductor's GPU code is Triton's, which starts at SM 7.0 (https://triton-lang.org/main/getting-started/installation.html)."""


@dataclass
class CompiledCall:
    """One module that was compiled in place, with the arguments to do it again on a copy."""

    module: nn.Module
    arguments: dict[str, Any]
    compiled: WatchedCall | None = None

    def install(self) -> None:
        """Compile the module in place, and put the watch around its compiled call."""
        self.compiled = WatchedCall.of(self.module, **self.arguments)
        setattr(self.module, COMPILED, self.compiled)

    def revert(self) -> str | None:
        """Take the compiled call off, unless somebody compiled the module anew."""
        now = vars(self.module).get(COMPILED)
        if now is None:
            return None
        if now is not self.compiled:
            return f"{type(self.module).__name__} was compiled anew meanwhile"
        delattr(self.module, COMPILED)
        return None

    def __getstate__(self) -> dict[str, Any]:
        """Leave the compiled call behind: modules drop theirs too when they are copied or pickled."""
        return {**vars(self), "compiled": None}

    def after_copy(self) -> None:
        """Compile the copied module as its original was."""
        self.install()


@dataclass
class CompiledComponent:
    """What the compiled modules of one component have to tell; itself it changes nothing."""

    modules: list[CompiledCall]

    def revert(self) -> None:
        """Nothing: each module's change undoes itself."""

    def tell(self) -> list[str]:
        """Say how often there was something to compile, and what runs eagerly."""
        return tell_of([module.compiled for module in self.modules if module.compiled is not None])


def apply(pipe: Any, options: CompileOptions) -> Journal:
    """Exact: compile one component in place; the work happens at its first call with each new signature."""
    tried = f"{options.action}()"
    root = component(pipe, _component_name(options), tried)
    _refuse_old_cards(root, options, tried)
    _refuse_before_the_first_lora(root, tried)
    arguments = {
        "mode": options.mode,
        "fullgraph": options.fullgraph,
        "dynamic": options.dynamic,
        "backend": options.backend,
    }
    targets = _targets(root, options, tried)
    with journaling() as journal:
        for module in targets:
            if vars(module).get(COMPILED) is not None:
                raise NotSupportedError(
                    explain_failure(
                        tried, f"{type(module).__name__} compiled already", "an eager module", "uncompile it first"
                    )
                )
            change = CompiledCall(module, arguments)
            change.install()
            journal.add(change)
        modules = [cast(CompiledCall, change) for change in journal.changes]
        journal.add(CompiledComponent(modules))
        if options.cache_dir:
            kept = KeptOnDisk(root, options, modules)
            journal.add(kept)
            journal.scopes.append(kept)
        what = "block" if options.regional else "module"
        journal.note(
            f"{len(targets)} {what}{'s' * (len(targets) > 1)} compiled at the first call with {options.backend}"
        )
    return journal


def _targets(root: nn.Module, options: CompileOptions, tried: str) -> list[nn.Module]:
    """Return the modules to compile: the whole, its repeated blocks, or a VAE's two halves.

    A VAE is entered through `decode` and `encode`, never through `forward`: compiling the VAE itself would do nothing.
    """
    if options.regional:
        names = set(getattr(root, "_repeated_blocks", None) or ())
        blocks = [module for module in root.modules() if type(module).__name__ in names]
        if not blocks:
            found = f"a {type(root).__name__} that names no repeated blocks"
            raise NotSupportedError(
                explain_failure(tried, found, "`_repeated_blocks`", "compile without regional=True")
            )
        return blocks
    halves = [half for name in ("encoder", "decoder") if isinstance(half := getattr(root, name, None), nn.Module)]
    return halves if _component_name(options) == "vae" and halves else [root]


def _component_name(options: CompileOptions) -> str:
    return options.action.removeprefix("compile_")


def _refuse_old_cards(root: nn.Module, options: CompileOptions, tried: str) -> None:
    device = next(root.parameters()).device
    if device.type != "cuda" or options.backend != "inductor":
        return
    sm = torch.cuda.get_device_capability(device)
    if sm < LOWEST_SM:
        found, needed = f"a card of SM {sm[0]}.{sm[1]}", f"SM {LOWEST_SM[0]}.{LOWEST_SM[1]} or newer for Triton"
        raise NotSupportedError(explain_failure(tried, found, needed, "use enable_sdpa() and enable_channels_last()"))


def _refuse_before_the_first_lora(root: nn.Module, tried: str) -> None:
    """Say now what diffusers would say when the first LoRA is loaded: hotswap is prepared on an eager module."""
    prepared = getattr(root, "_prepare_lora_hotswap_kwargs", None)
    if prepared and prepared.get("check_compiled", "error") == "error":
        found, needed = "hotswap prepared and no LoRA loaded yet", "the first LoRA, which is prepared when it is loaded"
        raise NotSupportedError(explain_failure(tried, found, needed, "call load_lora_weights() first, then compile"))
