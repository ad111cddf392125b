"""A device on which waiting shows without a GPU: torch's meta device, whose tensors have no values to be read.

Reading one (`.item()`, `bool()`, `nonzero()`, a copy to the host) raises there, where a GPU would make the host wait.
What raises nothing and waits all the same is written down: copies there from ordinary memory, and solving there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_turbo.schedulers import staging

DEVICE = torch.device("meta")

READS = (RuntimeError, NotImplementedError)
"""What reading a meta tensor raises."""

# it checks its result for singular matrices on the host
SOLVING = ("linalg_solve_ex", "_linalg_solve_ex")


class Waits(TorchDispatchMode):
    """Writes down each operation at which a GPU would make the host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.sent = 0
        self.page_locked: set[int] = set()

    def lock_pages(self, size: int) -> torch.Tensor:
        """Stand in for page-locked memory, and remember it as such."""
        made = torch.empty(size, dtype=torch.uint8)
        self.page_locked.add(made.untyped_storage().data_ptr())
        return made

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name == "_to_copy" and self._is_sent(args[0], result):
            self._judge(args[0], bool((kwargs or {}).get("non_blocking")))
        elif name == "copy_" and self._is_sent(args[1], args[0]):
            self._judge(args[1], bool(args[2:] and args[2]))
        elif name in SOLVING and any(isinstance(arg, torch.Tensor) and arg.device == DEVICE for arg in args):
            self.found.append(name)
        return result

    def _is_sent(self, source: Any, target: Any) -> bool:
        return source.device.type == "cpu" and target.device == DEVICE

    def _judge(self, source: torch.Tensor, non_blocking: bool) -> None:
        self.sent += 1
        if not (non_blocking and source.untyped_storage().data_ptr() in self.page_locked):
            self.found.append(f"copy of {tuple(source.shape)} to the device")


def make_readable_as_gpu(waits: Waits, monkeypatch: Any) -> None:
    """Let the package treat the meta device as it treats CUDA."""
    monkeypatch.setattr(staging, "PINNED_FOR", ("meta",))
    monkeypatch.setattr(staging, "page_locked", waits.lock_pages)


def with_timesteps_sent(scheduler: Any) -> Any:
    """Let a stock scheduler set its timesteps in host memory and send them, since Euler's reads its sigmas back."""
    set_timesteps = scheduler.set_timesteps

    def send(num_inference_steps: int, device: Any = None) -> None:
        set_timesteps(num_inference_steps)
        scheduler.timesteps = scheduler.timesteps.to(device)

    scheduler.set_timesteps = send
    return scheduler


def loop(scheduler: Any, waits: Waits, *, steps: int = 6, begin: int = 0, **arguments: Any) -> None:
    """Run a denoising loop on the device; what it waits for between the first step and the last is in `waits`."""
    scheduler.set_timesteps(steps, device=DEVICE)
    sample = torch.empty(2, 4, 8, 8, device=DEVICE)
    with waits:
        for t in scheduler.timesteps[begin:]:
            scaled = scheduler.scale_model_input(sample, t) if hasattr(scheduler, "scale_model_input") else sample
            sample = scheduler.step(torch.empty_like(scaled), t, sample, **arguments, return_dict=False)[0]
            assert sample.device == DEVICE
