"""Stage one: a small KL autoencoder, 128 px <-> 16x16 latents, without adversary or perceptual network."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from config import EDGE_WEIGHT, KL_WEIGHT, Training
from data import to_signed
from diffusers import AutoencoderKL
from loop import Trainer
from models import make_vae, whiten
from torch import Tensor


def edge_loss(output: Tensor, target: Tensor, scales: int = 3) -> Tensor:
    """L1 between the image gradients at full, half and quarter size, `[B, 3, H, W]` -> scalar.

    Plain L1 is content with soft contours; emoji are mostly contour.
    """
    difference, total = output - target, output.new_zeros(())
    for scale in range(scales):
        if scale:
            difference = F.avg_pool2d(difference, 2)
        total = total + difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
    return total / scales


def reconstruct(vae: AutoencoderKL, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Encode, sample, decode: images `[B, 3, H, W]` -> (images, KL divergence in nats per latent element)."""
    mean, log_var = vae.quant_conv(vae.encoder(x)).float().chunk(2, dim=1)
    log_var = log_var.clamp(-30, 20)
    kl = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).mean()
    return vae.decoder(vae.post_quant_conv(mean + noise * (0.5 * log_var).exp())), kl


@torch.no_grad()
def encode_all(vae: AutoencoderKL, images: Tensor, batch: int = 128) -> Tensor:
    """Latent means `[N, C, 16, 16]` of uint8 images `[N, 3, 128, 128]`, fp32, on the images' device."""
    return torch.cat([vae.encode(to_signed(chunk)).latent_dist.mean for chunk in images.split(batch)])


@torch.no_grad()
def psnr(vae: AutoencoderKL, images: Tensor, latents: Tensor, batch: int = 128) -> Tensor:
    """Per-image PSNR in dB of decoded latents against uint8 images, `[N]`."""
    values = []
    for chunk, z in zip(images.split(batch), latents.split(batch), strict=True):
        output = (vae.decode(z).sample.clamp(-1, 1) + 1) / 2
        values.append(-10 * (output - chunk.float() / 255).square().mean(dim=(1, 2, 3)).log10())
    return torch.cat(values)


def train_vae(images: Tensor, config: Training) -> tuple[AutoencoderKL, Tensor, dict[str, object]]:
    """Train on uint8 images `[N, 3, 128, 128]` (on the device).

    Returns:
        the VAE with whitened latents, the latents `[N, C, 16, 16]` of all images, and the log.
    """
    device = images.device
    vae = make_vae().to(device)
    cuda = device.type == "cuda"
    forward = torch.compile(reconstruct) if cuda else reconstruct

    def loss() -> Tensor:
        x = to_signed(images[torch.randint(len(images), (config.batch,), device=device)])
        noise = torch.randn(config.batch, vae.config.latent_channels, x.shape[2] // 8, x.shape[3] // 8, device=device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=cuda, cache_enabled=False):
            output, kl = forward(vae, x, noise)
        output = output.float()
        return (output - x).abs().mean() + EDGE_WEIGHT * edge_loss(output, x) + KL_WEIGHT * kl

    log = Trainer([vae], loss, config, len(images)).run("vae")
    vae.eval()
    latents = encode_all(vae, images)
    whiten(vae, latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3)))
    latents = encode_all(vae, images)
    values = psnr(vae, images, latents)
    log |= {
        "psnr_db_mean": round(values.mean().item(), 2),
        "psnr_db_p10": round(values.quantile(0.1).item(), 2),
        "latent_mean_abs": round(latents.mean(dim=(0, 2, 3)).abs().max().item(), 5),
        "latent_std": [round(s, 4) for s in latents.std(dim=(0, 2, 3)).tolist()],
    }
    print("vae", {k: v for k, v in log.items() if k != "curve"}, flush=True)
    return vae, latents, log
