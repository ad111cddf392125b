"""What an exported UNet was made for, as data; and whether a UNet at hand is that one still.

The compiled code fixes what Python decided while it was made: the architecture, the processors, FreeU's and LoRA's
numbers, and of every weight the dtype, shape and strides. It holds no weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Self

from torch import nn

from ..graphs.watch import NUMBERS
from .inputs import Bounds

FORMAT = 1
"""Raised whenever a card of an older package could be misread."""

NAMED = 3
"""How many weights or layers a reason names before it only counts."""


@dataclass(frozen=True, kw_only=True)
class Likeness:
    """All of a UNet that its compiled code depends on.

    Attributes:
        cls: name of its class.
        config: digest of its config, without names and versions.
        tensors: name -> dtype, shape and strides of each parameter and buffer.
        processors: layer -> its attention processor, with the plain options it has.
        numbers: layer -> the numbers of FreeU and LoRA in force there.
    """

    cls: str
    config: str
    tensors: dict[str, list[Any]]
    processors: dict[str, str]
    numbers: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Card:
    """What is written into a package beside its code.

    Attributes:
        format: version of this table.
        unet: the UNet it was made from.
        bounds: sizes of the inputs it may be given.
        machine: what its code runs on (see `exported.machine`).
        versions: package -> version it was made with.
    """

    format: int
    unet: Likeness
    bounds: Bounds
    machine: dict[str, Any]
    versions: dict[str, str]

    def to_json(self) -> str:
        """Return the card as text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read a card.

        Raises:
            ValueError, TypeError, KeyError: it is none, or one of another format.
        """
        table = json.loads(text)
        if table["format"] != FORMAT:
            raise ValueError(f"format {table['format']}, this version reads {FORMAT}")
        table["unet"], table["bounds"] = Likeness(**table["unet"]), Bounds(**table["bounds"])
        return cls(**table)


def likeness_of(unet: Any) -> Likeness:
    """Take down all of a UNet that compiled code of it depends on."""
    return Likeness(
        cls=type(unet).__name__,
        config=_digest(unet.config),
        tensors={
            name: [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), list(tensor.stride())]
            for name, tensor in tensors_of(unet).items()
        },
        processors={name: _described(processor) for name, processor in getattr(unet, "attn_processors", {}).items()},
        numbers={name: found for name, module in unet.named_modules() if (found := _numbers(module))},
    )


def tensors_of(module: nn.Module) -> dict[str, Any]:
    """Return parameters and buffers by name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def differences(made_for: Likeness, now: Likeness) -> list[str]:
    """Return why code made for the first is not code of the second; an empty list means it is."""
    reasons = []
    if now.cls != made_for.cls:
        reasons.append(f"a {now.cls}, exported from a {made_for.cls}")
    elif now.config != made_for.config:
        reasons.append(f"a {now.cls} of another config than the exported one")
    if missing := made_for.tensors.keys() - now.tensors.keys():
        wrapped = any(name.replace(".weight", ".base_layer.weight") in now.tensors for name in missing)
        why = ": an adapter wraps its layers" if wrapped else ""
        reasons.append(f"no {_some(missing)}{why}")
    elif added := now.tensors.keys() - made_for.tensors.keys():
        reasons.append(f"weights that were not exported: {_some(added)}")
    both = sorted(made_for.tensors.keys() & now.tensors.keys())
    for part, what in enumerate(("dtype", "shape", "strides")):
        other = [name for name in both if made_for.tensors[name][part] != now.tensors[name][part]]
        if other:
            here, there = (of.tensors[other[0]][part] for of in (now, made_for))
            reasons.append(f"another {what} of {_some(other)} ({here}, exported {there})")
            break  # where the dtype or the shape differs, the rest is no news
    for what, then, at_hand in (
        ("attention processors", made_for.processors, now.processors),
        ("numbers of FreeU or LoRA", made_for.numbers, now.numbers),
    ):
        changed = [name for name in sorted(then.keys() | at_hand.keys()) if then.get(name) != at_hand.get(name)]
        if changed:
            here, there = (of.get(changed[0], "none") for of in (at_hand, then))
            reasons.append(f"other {what} in {_some(changed)} ({here}, exported {there})")
    return reasons


def _digest(config: Any) -> str:
    plain = {name: value for name, value in dict(config).items() if not name.startswith("_")}
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()


def _described(processor: Any) -> str:
    plain = (bool, int, float, str, type(None))
    options = [f"{name}={value!r}" for name, value in sorted(vars(processor).items()) if isinstance(value, plain)]
    return f"{type(processor).__name__}({', '.join(options)})"


def _numbers(module: nn.Module) -> str:
    return ", ".join(
        f"{name}={vars(module)[name]!r}" for name in NUMBERS if vars(module).get(name) not in (None, [], False)
    )


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    more = f" and {len(listed) - NAMED} more" if len(listed) > NAMED else ""
    return f"{', '.join(listed[:NAMED])}{more}"
