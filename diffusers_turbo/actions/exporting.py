"""The UNet compiled ahead of time: written to a file by one process, run by others that need not compile.

`export_unet` changes nothing of the pipeline. `apply` puts the loaded code over the UNet's call, where
`module.compile()` would put its own: class, config, weights, hooks and state-dict keys stay.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ActionFailedError, InvalidOptionError, NotSupportedError, explain_failure, in_one_line
from ..exported.call import ExportedCall
from ..exported.card import FORMAT, Card, differences, likeness_of, tensors_of
from ..exported.machine import machine_of, reasons_against, versions
from ..exported.package import SUFFIX, Package, Runner, crash_when_loaded, read_package, write_package, writing
from ..exported.program import bounds_for, export_program
from ..facts.host import cxx_compiler
from ..graphs.watch import why_not_capturable
from ..planning.options import LoadExportedUNet
from ..trusted import reasons_not_to_trust
from .calls import COMPILED, ScopedCallOver
from .components import component, require_plain_weights
from .tf32 import fp32_precision
from .undo import Journal, journaling
from .unet_inputs import RELATIVE_TOLERANCE, TensorsOnly, example_inputs, relative_distance

logger = logging.getLogger("diffusers_turbo")

EXPORTABLE_PROCESSORS = ("AttnProcessor2_0", "FusedAttnProcessor2_0", "SDPAAttnProcessor")
"""Those that never hold the score matrix: it would outgrow the 32-bit indices of a GPU's compiled code."""


@dataclass
class ExportedUNet(ScopedCallOver):
    """A UNet under exported code; also the call scope that has it looked at once a call of the pipeline."""

    path: str = ""
    trouble: str | None = None

    def make(self, inner: Callable[..., Any]) -> ExportedCall:
        """Load the code."""
        package, device = _fitting_package(self.module, self.path), next(self.module.parameters()).device
        try:
            runner = package.load(device)
        except Exception as error:  # torch's loader, the dynamic linker, the driver: each raises its own type
            needed = "code that this torch can load"
            raise NotSupportedError(
                explain_failure(_tried(self.path), in_one_line(error, 300), needed, "export the UNet anew, here")
            ) from error
        return ExportedCall(self.module, package, runner)

    def tell(self) -> list[str]:
        """Say how often the code ran, and why the UNet itself did if it did."""
        return [f"this copy runs eagerly: {self.trouble}"] if self.trouble else super().tell()

    def after_copy(self) -> None:
        """Load the file for the copy, which runs without it where that fails, and says so."""
        try:
            self.install()
            self.trouble = None
        except NotSupportedError as error:
            self.trouble = str(error)
            logger.warning("the copy of the pipeline runs its UNet eagerly: %s", error)


def apply(pipe: Any, options: LoadExportedUNet) -> Journal:
    """Exact: run the UNet as code that `export_unet` compiled ahead of time, on the pipeline's own weights."""
    tried = _tried(options.path)
    unet = component(pipe, "unet", tried)
    require_plain_weights(pipe, tried)
    if options.path is None:
        needed, do = "the path of a package", "write one with export_unet(path) and name it"
        raise InvalidOptionError(explain_failure(tried, "no path", needed, do))
    _require_own_call(unet, tried)
    with journaling() as journal:
        change = ExportedUNet(unet, path=options.path)
        change.install()
        journal.add(change)
        journal.scopes.append(change)
        journal.note(f"no compiling; the weights are the pipeline's own ({Path(options.path).name})")
    return journal


def export_unet(
    pipe: Any, path: str | os.PathLike[str], *, height: int | None, width: int | None, batch_size: int, dynamic: bool
) -> Path:
    """Compile the pipeline's UNet with AOTInductor, check it against the UNet itself, and write it to `path`."""
    target, tried = Path(os.path.abspath(path)), f"export_unet({os.fspath(path)!r})"
    unet: Any = component(pipe, "unet", tried)
    require_plain_weights(pipe, tried)
    _check_request(target, tried, height=height, width=width, batch_size=batch_size)
    _require_own_call(unet, tried)
    _require_exportable(unet, tried)
    inputs, other = (
        _with_steps(example_inputs(unet, height, width, batch_size, other=larger)) for larger in (False, True)
    )
    bounds = bounds_for(inputs, tuple(unet.config.block_out_channels), dynamic=dynamic)
    card = Card(
        format=FORMAT,
        unet=likeness_of(unet),
        bounds=bounds,
        machine=machine_of(inputs[0].device),
        versions=versions(),
    )
    began = time.perf_counter()
    with writing(target) as draft:
        try:
            logger.info("%s: exporting", tried)
            program = export_program(TensorsOnly(unet), inputs, bounds, dynamic=dynamic)
            logger.info("%s: compiling after %.0f s, which takes minutes", tried, time.perf_counter() - began)
            write_package(program, card, draft)
        except Exception as error:  # torch.export, Inductor and the C++ compiler each raise their own types
            needed, do = "a UNet that torch.export and AOTInductor can compile", "see the error above this one"
            raise ActionFailedError(explain_failure(tried, in_one_line(error, 300), needed, do)) from error
        if (died_of := crash_when_loaded(draft, inputs[0].device)) is not None:
            found = f"code that crashes a process which loads it ({died_of}); it was compiled by {cxx_compiler()}"
            needed, do = "a C++ compiler that goes together with this torch", "name another, as in CXX=/usr/bin/g++"
            raise NotSupportedError(explain_failure(tried, found, needed, do))
        runner = read_package(draft, tried).load(inputs[0].device)
        worst = _distance(unet, runner, [inputs, other] if dynamic else [inputs], tried)
    size, seconds = target.stat().st_size, time.perf_counter() - began
    logger.info("%s: %.1f MB in %.0f s, %.1e from the UNet itself", tried, size / 1e6, seconds, worst)
    return target


def _tried(path: str | None) -> str:
    return f"load_exported_unet({path!r})"


def _fitting_package(unet: nn.Module, path: str) -> Package:
    """Read the package, and refuse one that was not made for this UNet on this machine."""
    tried = _tried(path)
    package = read_package(Path(path), tried)
    card, device = package.card, next(unet.parameters()).device
    reasons = reasons_against(card.machine, card.versions, device) + differences(card.unet, likeness_of(unet))
    if reasons:
        needed, do = "the UNet, the machine and the versions it was exported with", "export the UNet anew, here"
        raise NotSupportedError(explain_failure(tried, "; ".join(reasons), needed, do))
    return package


def _require_own_call(unet: nn.Module, tried: str) -> None:
    """Refuse a UNet whose call somebody else stands in for."""
    found = why_not_capturable(unet)
    if found is None and vars(unet).get(COMPILED) is not None:
        found = f"a {type(unet).__name__} that is compiled, exported or under graphs already"
    elif found is None and "forward" in vars(unet):
        found = f"a {type(unet).__name__} whose forward is replaced (a trace, a hook)"
    if found:
        raise NotSupportedError(explain_failure(tried, found, "a plain eager UNet", "switch that off first"))


def _require_exportable(unet: Any, tried: str) -> None:
    """Refuse UNets that take inputs an export does not know, and what would make the code wrong later."""
    from diffusers import UNet2DConditionModel

    found = None
    if not isinstance(unet, UNet2DConditionModel):
        found = f"a {type(unet).__name__}"
    elif wrapped := [name for name, module in unet.named_modules() if hasattr(module, "base_layer")]:
        found = f"adapters around {len(wrapped)} layers"
    elif others := {type(p).__name__ for p in unet.attn_processors.values()} - set(EXPORTABLE_PROCESSORS):
        found = f"attention processors {', '.join(sorted(others))}"
    else:
        config = unet.config
        known = {
            "addition_embed_type": (None, "text_time"),
            "encoder_hid_dim_type": (None,),
            "class_embed_type": (None,),
            "num_class_embeds": (None,),
            "time_cond_proj_dim": (None,),
            "time_embedding_type": ("positional",),
        }
        strange = [f"{name}={config.get(name)!r}" for name, values in known.items() if config.get(name) not in values]
        found = f"a UNet with {', '.join(strange)}" if strange else None
    if found:
        needed = f"a text-conditioned UNet2DConditionModel without adapters, under {' or '.join(EXPORTABLE_PROCESSORS)}"
        do = "fuse or unload adapters, enable_sdpa(), or use compile_unet()"
        raise NotSupportedError(explain_failure(tried, found, needed, do))


def _check_request(target: Path, tried: str, *, height: int | None, width: int | None, batch_size: int) -> None:
    """Refuse what can't be exported or written, before minutes are spent on it."""
    found = needed = None
    sizes = {"height": height, "width": width}
    wrong = [f"{name}={value!r}" for name, value in sizes.items() if value is not None and not _is_multiple(value, 8)]
    if wrong:
        found, needed = ", ".join(wrong), "a positive multiple of 8"
    elif not _is_multiple(batch_size, 1):
        found, needed = f"batch_size={batch_size!r}", "a positive integer"
    elif target.suffix != SUFFIX:
        found, needed = f"the name {target.name}", f"a name that ends in {SUFFIX}"
    elif target.is_dir() or not target.parent.is_dir():
        found, needed = f"no folder {target.parent}, or a folder {target}", "a file in a folder that is there"
    elif reasons := reasons_not_to_trust(target.parent):
        found, needed = "; ".join(reasons), "a folder that nobody else can write to: what lies there is run as code"
    if found and needed:
        raise InvalidOptionError(explain_failure(tried, found, needed, "correct the argument"))


def _is_multiple(value: object, of: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0 and value % of == 0


def _with_steps(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Give each row a timestep of its own, in the float32 that the UNet casts them to."""
    sample, timestep, *rest = inputs
    return (sample, timestep.to(torch.float32).repeat(len(sample)), *rest)


def _distance(unet: nn.Module, runner: Runner, examples: list[tuple[Tensor, ...]], tried: str) -> float:
    """Return how far the code is from the UNet at worst.

    Raises:
        NotSupportedError: further than rounding explains.
    """
    runner.bind(tensors_of(unet))
    with fp32_precision("ieee"):  # cuDNN convolves in TF32 by itself, whose rounding would hide a fault
        worst = max(relative_distance(unet, lambda *inputs: runner.run(inputs), each) for each in examples)
    limit = RELATIVE_TOLERANCE.get(examples[0][0].dtype, 1e-4)
    if not worst <= limit:
        found = f"code that is {worst:.1e} away from the UNet itself"
        raise NotSupportedError(explain_failure(tried, found, f"at most {limit:.0e}", "use compile_unet() instead"))
    return worst
