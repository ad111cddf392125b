"""What the exactness tests are made of: prompts and latents fixed once, pictures from them, three wrong variants."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

OBJECTS = ("rocket", "tiger", "pizza", "umbrella", "octopus", "guitar", "cactus", "snowman")
STYLES = ("flat", "gradient", "3d", "noto")
BATCH = 16


@dataclass(frozen=True)
class Embeddings:
    """Prompt embeddings `[P, T, D]`, those of the empty prompt `[1, T, D]`, and latents `[P, C, h, w]`, in fp32."""

    prompts: Tensor
    empty: Tensor
    latents: Tensor

    def first(self, count: int) -> Embeddings:
        """Only the first pairs."""
        return Embeddings(self.prompts[:count], self.empty, self.latents[:count])


def embed(pipe: Any, pairs: int, side: int) -> Embeddings:
    """Encode `pairs` prompts (objects in styles, each with a seed of its own) with an fp32 pipeline.

    Args:
        pipe: the pipeline.
        pairs: how many.
        side: of the latents, which need not be the one the model was trained at.
    """
    texts = [f"a {STYLES[i % 4]} emoji of {OBJECTS[i // 4 % 8]}" for i in range(pairs)]
    with torch.no_grad():
        prompts, _ = pipe.encode_prompt(texts, pipe.device, 1, False)
        empty, _ = pipe.encode_prompt("", pipe.device, 1, False)
    channels = pipe.unet.config.in_channels
    latents = [
        torch.randn(channels, side, side, generator=torch.Generator().manual_seed(seed)) for seed in range(pairs)
    ]
    return Embeddings(prompts, empty, torch.stack(latents))


def make_pictures(pipe: Any, embeddings: Embeddings, steps: int) -> tuple[Tensor, Tensor]:
    """Return pictures `[P, 3, H, W]` and final latents `[P, C, h, w]`, float on the CPU."""
    device, dtype = pipe._execution_device, pipe.unet.dtype
    pictures, finals = [], []

    def keep(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if step == steps - 1:
            finals.append(tensors["latents"].float().cpu())
        return tensors

    for start in range(0, len(embeddings.latents), BATCH):
        prompts = embeddings.prompts[start : start + BATCH].to(device, dtype)
        output = pipe(
            prompt_embeds=prompts,
            negative_prompt_embeds=embeddings.empty.to(device, dtype).expand(len(prompts), -1, -1),
            latents=embeddings.latents[start : start + BATCH].to(device, dtype),
            num_inference_steps=steps,
            output_type="pt",
            callback_on_step_end=keep,
        )
        pictures.append(output.images.float().cpu())
    return torch.cat(pictures), torch.cat(finals)


def wrong_variants(pipe: Any) -> dict[str, Callable[[], AbstractContextManager[None]]]:
    """Three faults a measure of exactness must see, each a context in which the pipeline has it."""
    unet = pipe.unet

    @contextmanager
    def mid_block_skipped() -> Iterator[None]:
        original = unet.mid_block.forward
        unet.mid_block.forward = lambda hidden_states, *args, **kwargs: hidden_states
        try:
            yield
        finally:
            unet.mid_block.forward = original

    @contextmanager
    def another_prompt() -> Iterator[None]:
        def swap(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            context = kwargs["encoder_hidden_states"]
            return args, kwargs | {"encoder_hidden_states": context.roll(1, dims=0)}

        layer = next(m for name, m in unet.named_modules() if name.endswith("attn2"))
        handle = layer.register_forward_pre_hook(swap, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def tenth_step_reused() -> Iterator[None]:
        original, calls, last = unet.forward, 0, None

        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls, last
            calls += 1
            if calls % 10 or last is None:
                last = original(*args, **kwargs)
            return last

        unet.forward = forward
        try:
            yield
        finally:
            unet.forward = original

    return {
        "mid block skipped": mid_block_skipped,
        "another prompt in one layer": another_prompt,
        "every tenth step reused": tenth_step_reused,
    }
