"""When device memory runs out during a call: make room by one step, and call the component again.

While the pipeline runs, an outermost call stands over each component's own. It holds the inputs, so a component that
failed is called again with them, and the steps before it are not lost. The error goes first: its traceback holds the
frames, and these hold the activations. Each step is an ordinary lever of the ledger and stays on.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..errors import OutOfMemoryError, TurboError, explain_failure, in_one_line
from ..facts.pipeline import read_pipeline
from ..planning.options import GroupOffload, MemoryFallback, Options, PartialOffload, SequentialOffload, VAETiling
from ..planning.shrinking import suggest
from .cached_memory import usable_bytes
from .calls import COMPILED
from .components import modules_of, networks_in
from .guarded_call import GuardedCall, shapes_of
from .ledger import Ledger, Lever, open_ledger, stack_name
from .memory_steps import Step, steps, vae_is_cast
from .offload import handing_over
from .out_of_memory import empty_cache, let_go, ran_out_of_memory
from .undo import Journal

logger = logging.getLogger("diffusers_turbo")

ENTRIES = ("encode", "decode")
"""The methods through which a pipeline enters its VAE; slices and tiles are made inside them."""

# One step at a time, whatever the pipeline: pipelines may share components.
_lock = threading.RLock()


@dataclass(frozen=True)
class Taken:
    """One step that was taken: where memory ran out, what was done, and what stood there before."""

    where: str
    what: str
    options: Options | None = None
    before: tuple[Options, ...] = ()
    off: tuple[Options, ...] = ()


@dataclass
class StepsDown:
    """The steps taken for one pipeline; also the call scope that stands over its components."""

    allow_tiling: bool
    taken: list[Taken] = field(default_factory=list)
    freed: set[str] = field(default_factory=set)
    refused: dict[str, str] = field(default_factory=dict)
    running: Running | None = None

    @contextmanager
    def around_call(self, pipe: Any) -> Iterator[None]:
        """Stand over the components inside the block; the first call in puts it up, the last one out takes it down."""
        with _lock:
            if self.running is None:
                self.running = Running(self, pipe)
                self.running.lay()
            running = self.running
            running.calls += 1
        try:
            yield
        except OutOfMemoryError:
            running.failed = True
            raise
        except Exception as error:
            if not ran_out_of_memory(error):
                raise
            running.failed = True
            told = in_one_line(error, 160)
            let_go(error)
            raise OutOfMemoryError(running.explain_between(told)) from None
        finally:
            with _lock:
                running.calls -= 1
                if running.calls == 0:
                    if running is self.running:
                        self.running = None
                    running.end()

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """Stand over nothing inside the block, in which the components are changed."""
        running = self.running
        if running is not None:
            running.lift()
        try:
            yield
        finally:
            if running is not None and running is self.running:
                running.lay()

    def revert(self) -> str | None:
        """Let a call that runs go on without; the steps are levers of their own."""
        if self.running is not None:
            self.running.lift()
            self.running = None
        return None

    def tell(self) -> list[str]:
        """Say what was done, and where memory had run out."""
        return [f"out of memory in {taken.where}: {taken.what}" for taken in self.taken]

    def __getstate__(self) -> dict[str, Any]:
        """Leave a running call behind."""
        return {**vars(self), "running": None}


class Running:
    """The calls of one pipeline that run now, and the steps down during them."""

    def __init__(self, record: StepsDown, pipe: Any) -> None:
        """Look for the pipeline's components; nothing stands over them yet."""
        self.record, self.pipe = record, pipe
        self.calls = 0
        self.failed = False
        self.ledger: Ledger = open_ledger(pipe)
        self._entered = [lever.journal for lever in self.ledger.in_force()]
        self._scopes = ExitStack()
        self._guards = list(self._find())
        vae = modules_of(pipe).get("vae")
        self._vae_dtype = next(vae.parameters()).dtype if vae is not None else None

    def _find(self) -> Iterator[GuardedCall]:
        for name, module in modules_of(self.pipe).items():
            methods = [entry for entry in ENTRIES if callable(getattr(module, entry, None))]
            if methods:
                yield from (GuardedCall(self, name, module, method, f"{name}.{method}") for method in methods)
            else:
                yield from (GuardedCall(self, name, network, COMPILED, name) for network in networks_in(module))

    def lay(self) -> None:
        """Stand over every component."""
        for guard in self._guards:
            guard.lay()

    def lift(self) -> None:
        """Stand over none."""
        for guard in reversed(self._guards):
            guard.lift()

    def end(self) -> None:
        """The pipeline's call is over: take everything down, and leave nothing cast or half on the device."""
        self.lift()
        try:
            if self.failed:
                self._tidy()
        finally:
            self._scopes.close()

    def _tidy(self) -> None:
        """Do what the pipeline does at the end of a call, and did not come to."""
        vae = modules_of(self.pipe).get("vae")
        if vae is not None and next(vae.parameters()).dtype != self._vae_dtype:
            vae.to(dtype=self._vae_dtype)
        self.pipe.maybe_free_model_hooks()
        self._free()

    def step_down(self, guard: GuardedCall, seen: int, told: str, args: Any, kwargs: Any) -> None:
        """Take the next step for a component that ran out of memory.

        Raises:
            OutOfMemoryError: there is none.
        """
        where = f"{guard.label}, call {guard.count}{shapes_of((args, kwargs))}"
        with _lock:
            if len(self.record.taken) != seen:
                return  # another thread made room meanwhile
            taken = self._next(guard, where, args, kwargs)
            if taken is None:
                raise OutOfMemoryError(self._explain(guard, where, told, args, kwargs))
            self.record.taken.append(taken)
            logger.warning("out of memory in %s: %s", where, taken.what)

    def _next(self, guard: GuardedCall, where: str, args: Any, kwargs: Any) -> Taken | None:
        if guard.label not in self.record.freed:
            self.record.freed.add(guard.label)
            self._apart(self._free)
            return Taken(where, "freed what was cached")
        height, width, batch_size = self._size(guard, args, kwargs)
        tiling = self.record.allow_tiling
        samples = len(rows) if (rows := _rows_of(args, kwargs)) is not None else 1
        side = max(height, width)
        for step in steps(self.pipe, self.ledger, guard.component, batch_size, samples, side, tiling=tiling):
            text = str(step)
            if text in self.record.refused:
                continue
            if step.alone and self.calls > 1:
                continue  # another thread may be inside a component that this would take apart
            slot = "" if step.options is None else stack_name(step.options)
            before = tuple(lever.options for lever in self.ledger.slots.get(slot, ()))
            try:
                self._apart(partial(self._apply, step))
            except (TurboError, torch.OutOfMemoryError) as error:
                self.record.refused[text] = in_one_line(error, 160)
                let_go(error)
                continue
            lossy = "" if step.options is None or step.options.exact else f"; LOSSY: {step.options.lossy_reason}"
            return Taken(where, f"{text}{lossy}", step.options, before, step.off)
        return None

    def _apart(self, change: Callable[[], None]) -> None:
        """Make a change with nothing standing over the components, and enter the call scopes that it brought."""
        with self.record.lifted():
            try:
                change()
            finally:
                self._enter_new_scopes()

    def _enter_new_scopes(self) -> None:
        for lever in self.ledger.in_force():
            if lever.journal is not None and not any(lever.journal is journal for journal in self._entered):
                self._entered.append(lever.journal)
                for scope in lever.journal.scopes:
                    self._scopes.enter_context(scope.around_call(self.pipe))

    def _apply(self, step: Step) -> None:
        done: list[Options] = []
        try:
            for options in step.off:
                self.ledger.disable(self.pipe, options.action)
                done.append(options)
            if isinstance(step.options, VAETiling) and not vae_is_cast(self.pipe):
                # an offload that streams has to see the tiles
                with handing_over(self.ledger), self.ledger.unhooked(self.pipe):
                    self.ledger.enable(self.pipe, step.options)
            elif step.options is not None:
                with handing_over(self.ledger):
                    self.ledger.enable(self.pipe, step.options)
        except BaseException:
            for options in done:
                _switch_on(self.pipe, options)
            raise
        empty_cache()

    def _free(self) -> None:
        """Give back what no tensor needs, half-loaded groups of an offload included."""
        lever = self.ledger.top("offload")
        hooked = lever is not None and isinstance(lever.options, (PartialOffload, GroupOffload, SequentialOffload))
        if hooked and self.calls <= 1 and not vae_is_cast(self.pipe):
            with handing_over(self.ledger), self.ledger.unhooked(self.pipe):
                pass
        empty_cache()

    def _size(self, guard: GuardedCall, args: Any, kwargs: Any) -> tuple[int, int, int]:
        """Return height and width in pixels and the pictures of a call, as its first tensor `[B, C, H, W]` says."""
        facts = read_pipeline(self.pipe)
        tensor = _rows_of(args, kwargs)
        batch_size = 1 if tensor is None else len(tensor)
        if guard.component not in ("vae",) and tensor is not None and tensor.ndim == 4:
            batch_size //= 2 if getattr(self.pipe, "do_classifier_free_guidance", False) and batch_size > 1 else 1
        if tensor is None or tensor.ndim != 4:
            return facts.default_height, facts.default_width, batch_size
        scale = 1 if guard.name == "encode" else facts.vae_scale_factor
        return tensor.shape[-2] * scale, tensor.shape[-1] * scale, batch_size

    def explain_between(self, told: str) -> str:
        """Say that memory ran out in the pipeline's own work, of which no call can be made again."""
        calls = ", ".join(f"{guard.count} of {guard.label}" for guard in self._guards if guard.count)
        return explain_failure(
            f"the pipeline's own work between its components (calls so far: {calls or 'none'})",
            f"device memory exhausted ({told}) after these steps: {self._done()}",
            "room for latents and pictures beside what the components hold",
            "call it again, since what was cached has been given back; or switch on enable_model_cpu_offload(), or "
            "make fewer or smaller pictures",
        )

    def _done(self) -> str:
        return "; ".join(taken.what for taken in self.record.taken) or "nothing"

    def _explain(self, guard: GuardedCall, where: str, told: str, args: Any, kwargs: Any) -> str:
        facts = read_pipeline(self.pipe)
        part = facts.component(guard.component)
        role = part.role if part is not None else "other"
        stage = {"vae": "decode", "text_encoder": "encode", "image_encoder": "encode"}.get(role, "denoise")
        height, width, batch_size = self._size(guard, args, kwargs)
        refused = "".join(f"; {text} was refused ({reason})" for text, reason in self.record.refused.items())
        return explain_failure(
            f"{where}, {batch_size} of {width}x{height} pixels",
            f"device memory exhausted ({told}) after these steps: {self._done()}{refused}",
            "more memory, or a call that needs less of it",
            suggest(
                facts,
                stage,
                height=height,
                width=width,
                batch_size=batch_size,
                options=[lever.options for lever in self.ledger.in_force()],
                usable_bytes=usable_bytes(self.pipe._execution_device),
                tiling=self.record.allow_tiling,
            ),
        )


def _rows_of(args: Any, kwargs: Any) -> Tensor | None:
    """Return the first tensor of a call that has rows."""
    return next((leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.ndim), None)


def apply(pipe: Any, options: MemoryFallback) -> Journal:
    """Exact: make room and try again when a component runs out of memory; the VAE's tiles, at last, if allowed."""
    record = StepsDown(options.allow_tiling)
    journal = Journal(changes=[record], scopes=[record])
    tiles = "VAE tiling, which is lossy, may be the last" if options.allow_tiling else "only exact ones"
    journal.note(f"steps are taken when memory runs out: {tiles}")
    return journal


def take_back(pipe: Any) -> None:
    """Take the steps back that are still as they were taken, last first, and put on again what made way for them."""
    ledger = open_ledger(pipe)
    lever = ledger.find(MemoryFallback.action)
    records = lever.journal.changes if lever is not None and lever.journal is not None else []
    for record in records:
        while isinstance(record, StepsDown) and record.taken:
            taken = record.taken.pop()
            slot = "" if taken.options is None else stack_name(taken.options)
            top = ledger.top(slot)
            if top is not None and top.options == taken.options:
                ledger.rearrange(pipe, slot, [Lever(options) for options in taken.before])
            for options in taken.off:
                _switch_on(pipe, options)


def _switch_on(pipe: Any, options: Options) -> None:
    try:
        getattr(pipe, options.action)(**options.as_dict())
    except TurboError as error:
        logger.warning("%s() made way for a step that is gone, and stays off: %s", options.action, error)
