"""On which machines packaged code runs: those of the same kind of device, GPU level and torch, with the same CPU."""

from __future__ import annotations

import platform
import sys
from typing import Any

import torch

from ..facts.device import probe
from ..facts.host import cpu_flags

PACKAGES = ("torch", "diffusers")
"""torch's binary interface is called by the code; diffusers' Python is what was compiled."""


def machine_of(device: torch.device) -> dict[str, Any]:
    """Return what decides whether compiled code runs: the device's kind and level, and the CPU that launches it."""
    facts = probe(str(device))
    return {
        "device": facts.device_type,
        "sm": list(facts.sm) if facts.sm else None,
        "system": f"{sys.platform} {platform.machine()}",
        "cpu_flags": sorted(cpu_flags()),
    }


def versions() -> dict[str, str]:
    """Return the versions that packaged code depends on."""
    found = probe("cpu").versions
    return {name: found[name] for name in PACKAGES}


def reasons_against(machine: dict[str, Any], made_with: dict[str, str], device: torch.device) -> list[str]:
    """Return why code made on `machine` with these versions can't run on `device` here; an empty list means it can."""
    here, reasons = machine_of(device), []
    if here["system"] != machine["system"]:
        reasons.append(f"{here['system']}, exported on {machine['system']}")
    if here["device"] != machine["device"]:
        reasons.append(f"a UNet on {here['device']}, exported on {machine['device']}")
    elif here["sm"] != machine["sm"]:
        level, made_for = (".".join(map(str, sm or ["?"])) for sm in (here["sm"], machine["sm"]))
        reasons.append(f"a card of SM {level}, exported for SM {made_for}")
    # the host's part is compiled for the very CPU (-march=native): one that lacks an instruction would end the process
    if lacking := sorted(set(machine["cpu_flags"]) - set(here["cpu_flags"])):
        reasons.append(f"a CPU without {', '.join(lacking[:3])}{' and more' if len(lacking) > 3 else ''}")
    now = versions()
    for name, version in made_with.items():
        if now.get(name) != version:
            reasons.append(f"{name} {now.get(name)}, exported with {version}")
    return reasons
