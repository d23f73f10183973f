"""Latents of a diffusers autoencoder: pictures in [0, 1] ↔ model space, with the autoencoder's own scale and shift."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class VAECodec:
    """Encode with the posterior's mode, decode to [0, 1].

    Model space is (latent − shift) · scaling, as the autoencoder's config states them. Videos (B, C, T, H, W) are
    coded frame by frame.

    Args:
        vae: `AutoencoderKL` or another diffusers autoencoder with its interface.
    """

    def __init__(self, vae: Any) -> None:
        self.vae = vae
        self.scale = float(getattr(vae.config, "scaling_factor", None) or 1.0)
        self.shift = float(getattr(vae.config, "shift_factor", None) or 0.0)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """uint8 or float [0, 1] pictures (B, 3, H, W) or clips (B, 3, T, H, W) → latents (B, C, [T,] h, w)."""
        pixels = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels
        frames, clip = self._frames(pixels)
        encoded = self.vae.encode((frames * 2 - 1).to(self.vae.device, self.vae.dtype))
        latent = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
        return self._clips((latent.float() - self.shift) * self.scale, clip)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, [T,] h, w) → float pictures (B, 3, H, W) or clips (B, 3, T, H, W), clamped to [0, 1]."""
        frames, clip = self._frames(latents)
        frames = (frames / self.scale + self.shift).to(self.vae.device, self.vae.dtype)
        pixels = self.vae.decode(frames, return_dict=False)[0]
        return self._clips((pixels.float() / 2 + 0.5).clamp(0, 1), clip)

    @staticmethod
    def _frames(x: Tensor) -> tuple[Tensor, int | None]:
        if x.ndim == 4:
            return x, None
        return x.transpose(1, 2).flatten(0, 1), x.shape[2]

    @staticmethod
    def _clips(x: Tensor, frames: int | None) -> Tensor:
        return x if frames is None else x.unflatten(0, (-1, frames)).transpose(1, 2)
