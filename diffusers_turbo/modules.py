"""Walks over module trees that are taken at each call of a pipeline, while the GPU waits."""

from __future__ import annotations

from torch import nn


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
