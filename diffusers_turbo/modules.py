"""Walks over module trees that are taken at each call of a pipeline, while the GPU waits; and what they look for."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

HOOKS = ("_hf_hook", "_diffusers_hook")
"""Where accelerate and diffusers hang hooks that move weights or run Python in the middle of a call."""

_ACCELERATES, _DIFFUSERS = HOOKS


def modules_in(*roots: nn.Module) -> list[nn.Module]:
    """Return the modules of some trees in the order of `nn.Module.modules()`, each once.

    That one makes a dotted name for each module on its way, which is most of its time.

    >>> [type(module).__name__ for module in modules_in(nn.Sequential(nn.Sequential(nn.SiLU()), nn.ReLU()))]
    ['Sequential', 'Sequential', 'SiLU', 'ReLU']
    """
    found: dict[nn.Module, None] = {}

    def add(modules: Iterable[nn.Module | None]) -> None:
        for module in modules:
            if module is not None and module not in found:
                found[module] = None
                if children := module._modules:
                    add(children.values())

    add(roots)
    return list(found)


def is_hooked(module: nn.Module) -> bool:
    """Whether one of these hooks hangs on a module itself."""
    state = vars(module)  # no loop: this is asked of thousands of modules
    return _ACCELERATES in state or _DIFFUSERS in state


def bring_of(module: nn.Module) -> Callable[[], None] | None:
    """Return what brings a module's weights ahead of its call; None where none hangs on it that lets it be recorded.

    Whoever reads the weights before the module's own forward, or replays one, calls it first.
    """
    hook = vars(module).get(_ACCELERATES)
    return getattr(hook, "bring", None) if getattr(hook, "lets_record", False) else None


def end_of(module: nn.Module) -> Callable[[], None] | None:
    """Return what ends a call of a module that was interrupted, where its weights are streamed."""
    hook = vars(module).get(_ACCELERATES)
    return getattr(hook, "interrupted", None)


def has_own_forward(module: nn.Module) -> bool:
    """Whether a module's forward is its class's, if need be under a hook that lets it be recorded."""
    if bring_of(module) is None:
        return "forward" not in vars(module)
    return getattr(vars(module).get("_old_forward"), "__func__", None) is type(module).forward


def device_of(module: nn.Module) -> torch.device:
    """Return where a module works: where its weights are, or where they are brought."""
    if will_record(module):
        return torch.device(vars(module)[_ACCELERATES].execution_device)
    return next(module.parameters()).device


def will_record(module: nn.Module) -> bool:
    """Whether an offload on a module lets its calls be recorded, at the latest once it knows the order of layers."""
    return bool(getattr(vars(module).get(_ACCELERATES), "will_record", False))


def moves_unrecorded(module: nn.Module) -> bool:
    """Whether a hook hangs on a module whose work a recording would leave out."""
    return is_hooked(module) and not getattr(vars(module).get(_ACCELERATES), "lets_record", False)


def never_recorded(module: nn.Module) -> bool:
    """Whether a hook hangs on a module whose work no recording will ever hold."""
    return is_hooked(module) and not will_record(module)


def hooked_in(root: nn.Module) -> bool:
    """Whether one of these hooks hangs on any module of a tree.

    >>> hooked_in(nn.Sequential(nn.SiLU()))
    False
    """
    return any(map(is_hooked, modules_in(root)))
