"""Walks over module trees that are taken at each call of a pipeline, while the GPU waits; and what they look for."""

from __future__ import annotations

from torch import nn

HOOKS = ("_hf_hook", "_diffusers_hook")
"""Where accelerate and diffusers hang hooks that move weights or run Python in the middle of a call."""


def modules_in(*roots: nn.Module) -> list[nn.Module]:
    """Return the modules of some trees in the order of `nn.Module.modules()`, each once.

    That one makes a dotted name for each module on its way, which is most of its time.

    >>> [type(module).__name__ for module in modules_in(nn.Sequential(nn.Sequential(nn.SiLU()), nn.ReLU()))]
    ['Sequential', 'Sequential', 'SiLU', 'ReLU']
    """
    found: dict[nn.Module, None] = {}
    waiting = [*reversed(roots)]
    while waiting:
        module = waiting.pop()
        if module not in found:
            found[module] = None
            waiting += [child for child in reversed(vars(module)["_modules"].values()) if child is not None]
    return list(found)


def is_hooked(module: nn.Module) -> bool:
    """Whether one of these hooks hangs on a module itself."""
    return any(hook in vars(module) for hook in HOOKS)
