"""Stage two: UNet and text encoder, trained together to predict noise in the VAE's latents."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from config import CAPTION_VARIANTS, EMPTY_CAPTION_RATE, MIN_SNR_GAMMA, SCHEDULER_CONFIG, Training
from diffusers import DDIMScheduler, UNet2DConditionModel
from loop import Trainer
from torch import Tensor
from transformers import CLIPTextModel


def min_snr_weights(alphas_cumprod: Tensor) -> Tensor:
    """Loss weight of each timestep for noise prediction, min(SNR, 5) / SNR, `[T]` -> `[T]`.

    Timesteps with little noise are easy and many; this keeps them from taking all of the capacity.
    """
    snr = alphas_cumprod / (1 - alphas_cumprod)
    return snr.clamp(max=MIN_SNR_GAMMA) / snr


def train_unet(
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    latents: Tensor,
    captions: Tensor,
    config: Training,
    start: Callable[[], None] = lambda: None,
    deadline: float = math.inf,
) -> dict[str, object]:
    """Train both in place.

    Args:
        latents: of all images, `[N, C, 16, 16]`; zero mean and unit variance per channel. Read at every step, so
            they may be filled in by `start`.
        captions: token ids, `[N + 1, CAPTION_VARIANTS, 77]`; the last row is the empty caption.
        start, deadline: see `Trainer.run`.

    Returns:
        the log.
    """
    device, images, batch = latents.device, len(latents), config.batch
    alphas_cumprod = DDIMScheduler(**SCHEDULER_CONFIG).alphas_cumprod.to(device)
    weights = min_snr_weights(alphas_cumprod)

    def predict(noisy: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        return unet(noisy, t, text_encoder(ids).last_hidden_state, return_dict=False)[0]

    cuda = device.type == "cuda"
    forward = torch.compile(predict) if cuda else predict

    def loss() -> Tensor:
        index = torch.randint(images, (batch,), device=device)
        t = torch.randint(len(alphas_cumprod), (batch,), device=device)
        empty = torch.rand(batch, device=device) < EMPTY_CAPTION_RATE
        ids = captions[index.where(~empty, images), torch.randint(CAPTION_VARIANTS, (batch,), device=device)]
        clean = latents[index]
        noise = torch.randn_like(clean)
        signal = alphas_cumprod[t].view(-1, 1, 1, 1)
        noisy = signal.sqrt() * clean + (1 - signal).sqrt() * noise
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=cuda, cache_enabled=False):
            predicted = forward(noisy, t, ids)
        errors = F.mse_loss(predicted.float(), noise, reduction="none").mean(dim=(1, 2, 3))
        return (weights[t] * errors).mean()

    log = Trainer([unet, text_encoder], loss, config, images).run("unet", start, deadline)
    unet.eval(), text_encoder.eval()
    return log
