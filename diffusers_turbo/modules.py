"""Walks over module trees that are taken at each call of a pipeline, while the GPU waits; and what they look for."""

from __future__ import annotations

from collections.abc import Iterable

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


def hooked_in(root: nn.Module) -> bool:
    """Whether one of these hooks hangs on any module of a tree.

    >>> hooked_in(nn.Sequential(nn.SiLU()))
    False
    """
    return any(map(is_hooked, modules_in(root)))
