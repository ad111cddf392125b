"""Weights in host memory until they are needed: by model, by layer, or by group of layers, and back again exactly.

The hooks are diffusers' and accelerate's own. What they lack is a way back: removing them leaves weights on the CPU,
bound `forward` methods in module dictionaries, and parameters replaced by copies. `Placement` remembers all of that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..errors import NotSupportedError, explain_failure
from ..facts.pipeline import upcasts_vae
from ..modules import is_hooked
from ..planning.options import GroupOffload, ModelOffload, SequentialOffload
from .components import modules_of, require_plain_weights
from .host import host_method
from .ledger import Ledger
from .undo import ABSENT, Journal, journaling, owned, put

MODULE_NAMES = ("_hf_hook", "_old_forward", "_diffusers_hook", "forward")
"""What accelerate's and diffusers' hooks set on modules."""

PIPELINE_NAMES = ("_all_hooks", "_offload_gpu_id", "_offload_device")
"""What diffusers' offload methods set on pipelines."""

CAST_TOGETHER = ("vae", "unet", "transformer")
"""The components whose dtypes tell whether a pipeline casts its VAE for decoding."""

GROUP_HOOKS = ("group_offloading", "layer_execution_tracker", "lazy_prefetch_group_offloading")
"""The names group offloading registers its hooks under (diffusers.hooks.group_offloading); it has no public way off."""


@dataclass
class TensorPlace:
    """Where one parameter or buffer was: its owner, its object, its device, and whether it lay in pinned memory."""

    owner: nn.Module
    table: str
    name: str
    tensor: torch.Tensor
    device: torch.device
    pinned: bool

    def restore(self, device: torch.device | None = None) -> None:
        """Put the original object back, with the values of now, on its device of then, or on `device`."""
        held = getattr(self.owner, self.table)
        now = held.get(self.name)
        if now is None:
            return
        if now is not self.tensor:
            if now.device.type != "meta" and not torch.equal(now.data.cpu(), self.tensor.data.cpu()):
                self.tensor.data = now.data
            held[self.name] = self.tensor
        data = self.tensor.data.to(self.device if device is None else device)
        if data.device.type == "cpu" and not self.pinned and data.is_pinned():
            data = data.clone()
        self.tensor.data = data


@dataclass
class Placement:
    """Where every tensor, hook and offload attribute of a pipeline was before it was offloaded."""

    pipe: Any
    tensors: list[TensorPlace] = field(default_factory=list)
    hooks: list[tuple[nn.Module, str, Any]] = field(default_factory=list)
    attributes: list[tuple[str, Any]] = field(default_factory=list)
    devices: dict[str, torch.device] = field(default_factory=dict)
    stays: bool = False
    """Whether a revert leaves the weights in host memory, for another offload to take over."""

    @classmethod
    def of(cls, pipe: Any) -> Placement:
        """Take down the placement of all components of `pipe`."""
        placement = cls(pipe, attributes=[(name, owned(pipe, name)) for name in PIPELINE_NAMES])
        for component, root in modules_of(pipe).items():
            for owner in root.modules():
                placement.hooks.extend((owner, name, owned(owner, name)) for name in MODULE_NAMES)
                for table in ("_parameters", "_buffers"):
                    for name, tensor in getattr(owner, table).items():
                        if tensor is not None:
                            pinned = tensor.device.type == "cpu" and tensor.is_pinned()
                            place = TensorPlace(owner, table, name, tensor, tensor.device, pinned)
                            placement.tensors.append(place)
                            placement.devices.setdefault(component, tensor.device)
        return placement

    def revert(self) -> str | None:
        """Remove the offload hooks and bring everything back to where it was."""
        from accelerate.hooks import remove_hook_from_module

        roots = modules_of(self.pipe)
        recorded = {id(owner): owner for owner, _, _ in self.hooks}
        touched = {key for key, owner in recorded.items() if _was_hooked(owner)}
        # Modules that came meanwhile (LoRA layers) carry hooks too.
        for module in {**recorded, **{id(m): m for root in roots.values() for m in root.modules()}}.values():
            _remove_group_hooks(module)
            remove_hook_from_module(module)
        for owner, name, before in self.hooks:
            if id(owner) in touched and not _holds_foreign_hook(owner):
                # a forward that was taken back while a hook lay over it is nobody's any more
                put(owner, name, ABSENT if getattr(before, "lifted", False) else before)
        host = torch.device("cpu") if self.stays else None
        for place in self.tensors:
            place.restore(host)
        for component, root in roots.items():
            for owner in root.modules():
                if id(owner) not in recorded and component in self.devices:
                    _move_own(owner, host or self.devices[component])
        for name, before in self.attributes:
            put(self.pipe, name, before)
        return None

    def inherit(self, earlier: Placement) -> None:
        """Take over from an offload that was in force before where everything was before that one."""
        known = {(id(place.owner), place.table, place.name): place for place in earlier.tensors}
        for place in self.tensors:
            if (before := known.get((id(place.owner), place.table, place.name))) is not None:
                place.device, place.pinned = before.device, before.pinned
        self.devices |= earlier.devices


@contextmanager
def handing_over(ledger: Ledger) -> Iterator[None]:
    """Let another offload take over from the one in force, inside the block, with the weights in host memory all along.

    On its own each offload brings the weights back to where they were first, which is where there is no room.
    """
    earlier = _placement_in_force(ledger)
    if earlier is not None:
        earlier.stays = True
    try:
        yield
    finally:
        now = _placement_in_force(ledger)
        if earlier is not None:
            earlier.stays = False
            if now is None:
                for place in earlier.tensors:
                    place.restore()
            elif now is not earlier:
                now.inherit(earlier)


def _placement_in_force(ledger: Ledger) -> Placement | None:
    lever = ledger.top("offload")
    changes = lever.journal.changes if lever is not None and lever.journal is not None else ()
    return next((change for change in changes if isinstance(change, Placement)), None)


@dataclass
class ReturnAfterCall:
    """Call scope: when a call ends, the component goes back to host memory, unless something else moves it by then.

    Attributes:
        module: the component.
        hook: what brings it to the device.
    """

    module: nn.Module
    hook: Any

    @contextmanager
    def around_call(self, pipe: Any) -> Iterator[None]:
        """Run the call, then move the module to the CPU."""
        try:
            yield
        finally:
            if vars(self.module).get("_hf_hook") is self.hook:
                self.module.to("cpu")


def apply_model(pipe: Any, options: ModelOffload) -> Journal:
    """Exact: keep each component in host memory except while it works."""
    return _by_host(pipe, options)


def apply_sequential(pipe: Any, options: SequentialOffload) -> Journal:
    """Exact: keep each layer's weights in host memory except while the layer works."""
    if options.device is not None and torch.device(options.device).type == "cpu":
        found, needed = "device cpu, where the weights wait already", "an accelerator to work on"
        raise NotSupportedError(explain_failure(f"{options.action}()", found, needed, "leave offload off on a CPU"))
    return _by_host(pipe, options)


def _by_host(pipe: Any, options: ModelOffload | SequentialOffload) -> Journal:
    tried = f"{options.action}()"
    refuse_foreign_offload(pipe, tried)
    device = options.device if options.device is not None else accelerator(tried)
    if device != options.device and options.gpu_id is not None:
        device = torch.device(torch.device(device).type)
    with journaling() as journal:
        journal.add(Placement.of(pipe))
        host_method(pipe, options.action)(gpu_id=options.gpu_id, device=device)
        journal.note(f"weights wait in host memory, work happens on {device}")
    return journal


def apply_group(pipe: Any, options: GroupOffload) -> Journal:
    """Exact: keep groups of layers in host memory, bringing each in (ahead of time with a stream) when it works.

    An autoencoder that the pipeline casts to float32 for decoding (SDXL's), or that tiles under a stream, does not go
    together with group hooks, which hold its tensors: it is moved as a whole for the decode, and back after the call.
    """
    tried = "enable_group_offload()"
    refuse_foreign_offload(pipe, tried)
    arguments = options.as_dict()
    device = torch.device(arguments["onload_device"] or accelerator(tried))
    arguments["onload_device"] = device
    arguments["offload_device"] = torch.device(arguments["offload_device"])
    if options.offload_type == "block_level" and options.num_blocks_per_group is None:
        arguments["num_blocks_per_group"] = 1
    excluded = _names(options.exclude_modules)
    whole = [] if "vae" in excluded else _moved_as_a_whole(pipe, options)
    arguments["exclude_modules"] = [*excluded, *whole]
    with journaling() as journal:
        journal.add(Placement.of(pipe))
        host_method(pipe, "enable_group_offload")(**arguments)
        for name in whole:
            from accelerate import cpu_offload_with_hook

            module = modules_of(pipe)[name]
            cpu_offload_with_hook(module, device)
            journal.scopes.append(ReturnAfterCall(module, vars(module)["_hf_hook"]))
            journal.note(f"{name} is moved as a whole: its cast to float32 or its tiles do not go with group hooks")
        journal.note(f"{options.offload_type} groups wait on {arguments['offload_device']}, work happens on {device}")
    return journal


def _moved_as_a_whole(pipe: Any, options: GroupOffload) -> list[str]:
    vae = modules_of(pipe).get("vae")
    if vae is None:
        return []
    # a VAE that is in float32 for a decode just now will be cast back: the denoiser tells
    dtypes = {next(module.parameters()).dtype for name, module in modules_of(pipe).items() if name in CAST_TOGETHER}
    half = torch.float16 in dtypes
    tiled_under_stream = options.use_stream and bool(getattr(vae, "use_tiling", False))
    return ["vae"] if (half and upcasts_vae(pipe)) or tiled_under_stream else []


def _names(names: str | tuple[str, ...] | None) -> list[str]:
    return [names] if isinstance(names, str) else list(names or ())


def accelerator(tried: str) -> torch.device:
    """Return the accelerator of this machine.

    Raises:
        NotSupportedError: there is none.
    """
    if torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator()
        assert device is not None
        return device
    raise NotSupportedError(
        explain_failure(
            tried, "no accelerator on this machine", "a device to work on", "pass one, or leave offload off"
        )
    )


def refuse_foreign_offload(pipe: Any, tried: str) -> None:
    """Refuse pipelines whose weights somebody else moves or holds.

    Raises:
        NotSupportedError: with the component and the reason.
    """
    require_plain_weights(pipe, tried)
    for name, root in modules_of(pipe).items():
        for module in root.modules():
            if "_hf_hook" in vars(module) or _group_hooks(module):
                raise NotSupportedError(
                    explain_failure(
                        tried,
                        f"offload hooks on `{name}` that this package did not set",
                        "a pipeline without offload hooks",
                        "remove them (pipe.remove_all_hooks()) or load the pipeline anew",
                    )
                )


def _move_own(module: nn.Module, device: torch.device) -> None:
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        tensor.data = tensor.data.to(device)


def _group_hooks(module: nn.Module) -> list[str]:
    registry = vars(module).get("_diffusers_hook")
    return [name for name in GROUP_HOOKS if registry is not None and name in registry.hooks]


def _remove_group_hooks(module: nn.Module) -> None:
    for name in reversed(_group_hooks(module)):
        vars(module)["_diffusers_hook"].remove_hook(name, recurse=False)


def _was_hooked(module: nn.Module) -> bool:
    """Whether a module carries hooks, or what is left of them: its own forward, bound. Others' forwards stay."""
    state = vars(module)
    left = getattr(state.get("forward"), "__self__", None) is module
    return is_hooked(module) or "_old_forward" in state or left


def _holds_foreign_hook(module: nn.Module) -> bool:
    """Whether somebody else's diffusers hook is still on the module (layerwise casting, a cache)."""
    registry = vars(module).get("_diffusers_hook")
    return registry is not None and bool(registry.hooks)
