"""The training loop that both stages share: a step that never leaves the device, timed by the wall clock."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from config import Training
from torch import Tensor, nn


class Trainer:
    """Minimise `loss()` over the modules' parameters for a given time.

    `loss` draws its own batch on the device, so a step needs nothing from the host. On CUDA the whole step (draw,
    forward, backward, clip, AdamW) is captured once as a CUDA graph and replayed: small models are otherwise bound
    by the launches of their kernels, not by the GPU.

    Args:
        modules: trained together; their parameters are updated in place.
        loss: returns the mean loss of one freshly drawn batch, a scalar.
        images: how many training images there are, to count epochs.
    """

    def __init__(self, modules: list[nn.Module], loss: Callable[[], Tensor], config: Training, images: int) -> None:
        self.config, self.loss, self.images = config, loss, images
        self.params = [p for module in modules for p in module.parameters()]
        self.device = self.params[0].device
        self.lr = torch.zeros((), device=self.device)
        self.optimizer = torch.optim.AdamW(
            self.params,
            lr=self.lr,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=True,
            capturable=self.device.type == "cuda",
        )
        # The fused optimizers skip a step whose `found_inf` is 1: torch.amp.GradScaler's protocol, used here so that
        # one batch of infinities cannot poison the weights and no host check is needed.
        self.optimizer.grad_scale = None
        self.optimizer.found_inf = torch.zeros((), device=self.device)
        self.ema = [p.detach().clone() for p in self.params]
        self.loss_sum = torch.zeros((), device=self.device)
        self.steps = 0
        self.history: list[dict[str, float]] = []

    def _step(self) -> None:
        loss = self.loss()
        loss.backward()
        grads = [p.grad for p in self.params if p.grad is not None]
        norm = nn.utils.get_total_norm(grads, foreach=True)
        torch._foreach_mul_(grads, (self.config.clip_norm / (norm + 1e-6)).clamp(max=1.0))
        self.optimizer.found_inf.copy_(~norm.isfinite())
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss_sum += loss.detach().nan_to_num()

    def _prepare(self) -> Callable[[], None]:
        """Compile, and on CUDA capture, the step with a learning rate of zero: the weights do not move."""
        self.lr.zero_()
        if self.device.type != "cuda":
            return self._step
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        return graph.replay

    def _learning_rate(self, progress: float) -> float:
        """Linear warm-up by steps, then half a cosine down to zero by `progress` (0..1 of the time)."""
        warm = min(1.0, (self.steps + 1) / self.config.warmup_steps)
        return self.config.peak_lr * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    def _average(self) -> None:
        decay = min(self.config.ema_decay, (1 + self.steps) / (10 + self.steps)) ** self.config.ema_every
        torch._foreach_lerp_(self.ema, [p.detach() for p in self.params], 1 - decay)

    def _sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def run(self, name: str, start: Callable[[], None] = lambda: None, deadline: float = math.inf) -> dict[str, object]:
        """Train until the time is over, then put the averaged weights into the modules.

        Args:
            name: shown on the progress lines.
            start: called when compilation is done; it may wait for something. The clock starts when it returns.
            deadline: of `time.perf_counter`; the schedule is shortened to end there.

        Returns:
            the log: compile and training seconds, steps, throughput, and the loss curve.
        """
        begun = time.perf_counter()
        step = self._prepare()
        self._sync()
        prepare_s = time.perf_counter() - begun
        print(f"{name}: ready after {prepare_s:.1f} s", flush=True)
        start()
        started = time.perf_counter()
        seconds = min(self.config.seconds, max(1.0, deadline - started))
        for state in self.optimizer.state.values():  # forget the moments of the steps taken while preparing
            for value in state.values():
                value.zero_()
        self.loss_sum.zero_()
        shown_s, shown_step = 0.0, 0
        while True:
            elapsed = time.perf_counter() - started
            self.lr.fill_(self._learning_rate(elapsed / seconds))
            for _ in range(self.config.ema_every):
                step()
                self.steps += 1
            self._average()
            self._sync()  # without it the host runs far ahead and the clock means nothing
            elapsed = time.perf_counter() - started
            done = elapsed >= seconds or self.steps >= (self.config.max_steps or math.inf)
            if done or elapsed - shown_s >= 10:
                window = self.steps - shown_step
                point = {
                    "s": round(elapsed, 1),
                    "step": self.steps,
                    "epoch": round(self.steps * self.config.batch / self.images, 1),
                    "loss": round(self.loss_sum.item() / window, 5),
                    "lr": round(self.lr.item(), 6),
                    "images_per_s": round(window * self.config.batch / (elapsed - shown_s)),
                }
                self.history.append(point)
                print(name, point, flush=True)
                shown_s, shown_step = elapsed, self.steps
                self.loss_sum.zero_()
            if done:
                break
        with torch.no_grad():
            torch._foreach_copy_([p.detach() for p in self.params], self.ema)
        return {
            "prepare_s": round(prepare_s, 1),
            "train_s": round(elapsed, 1),
            "steps": self.steps,
            "batch": self.config.batch,
            "peak_lr": self.config.peak_lr,
            "epochs": round(self.steps * self.config.batch / self.images),
            "images_per_s": round(self.steps * self.config.batch / elapsed),
            "curve": self.history,
        }
