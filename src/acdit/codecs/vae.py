"""Latents of a diffusers autoencoder: pictures in [0, 1] ↔ model space, with the autoencoder's own scale and shift."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from acdit.codecs.autoencoders import LatentScale, latent_channels, spatial_factor
from acdit.codecs.pixels import flip_pictures
from acdit.errors import ConfigError

POSTERIORS = ("mode", "sample")


class VAECodec:
    """Pictures ↔ latents of any diffusers autoencoder with `encode` and `decode`.

    Model space is (latent − shift) · scaling, as the autoencoder's config states them (`LatentScale`: also means and
    deviations per channel). Videos (B, C, T, H, W) are coded frame by frame. Autoencoders without a posterior
    (`AutoencoderTiny`, `AutoencoderDC`, VQ) have standard deviation 0.

    Args:
        vae: `AutoencoderKL`, `AutoencoderTiny`, `AutoencoderDC` or another with their interface.
        posterior: "mode", or "sample": encoding then needs noise or a generator.

    Raises:
        ConfigError: an unknown posterior, or contradicting scales in the autoencoder's config.
    """

    def __init__(self, vae: Any, posterior: str = "mode") -> None:
        if posterior not in POSTERIORS:
            raise ConfigError("codec.posterior", found=repr(posterior), expected=f"one of {POSTERIORS}")
        self.vae, self.posterior = vae, posterior
        self.scale = LatentScale.of(vae)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of a picture.

        Raises:
            ConfigError: the edges are no multiples of the autoencoder's factor.
        """
        factor = spatial_factor(self.vae)
        if height % factor or width % factor:
            raise ConfigError(
                "picture size", found=f"{height}×{width}", expected=f"multiples of {factor}, the autoencoder's factor",
                fix="change data.size",
            )  # fmt: skip
        return latent_channels(self.vae), height // factor, width // factor

    def model_shape(self, data_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the latents of a picture (C, H, W) or a clip (C, T, H, W): (c, [T,] h, w).

        Raises:
            ConfigError: as `latent_shape`.
        """
        channels, height, width = self.latent_shape(*data_shape[-2:])
        return channels, *data_shape[1:-2], height, width

    def noise_shape(self, data_shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """Shape of the noise that `encode` wants for one picture (C, H, W) or clip (C, T, H, W); None: none."""
        return self.model_shape(data_shape) if self.posterior == "sample" else None

    flip = staticmethod(flip_pictures)

    @torch.no_grad()
    def moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the posterior in model space.

        Args:
            pixels: uint8 or float [0, 1] pictures (B, 3, H, W) or clips (B, 3, T, H, W).

        Returns:
            fp32 (B, C, [T,] h, w), twice.
        """
        pixels = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels
        frames, clip = self._frames(pixels)
        encoded = self.vae.encode((frames * 2 - 1).to(self.vae.device, self.vae.dtype))
        if hasattr(encoded, "latent_dist"):
            mean, std = encoded.latent_dist.mode().float(), encoded.latent_dist.std.float()
        else:
            # AutoencoderTiny and VQ say `latents`, AutoencoderDC says `latent`.
            mean = (encoded.latents if hasattr(encoded, "latents") else encoded.latent).float()
            std = torch.zeros_like(mean)
        return self._clips(self.scale.to_model(mean), clip), self._clips(self.scale.std_to_model(std), clip)

    @torch.no_grad()
    def encode(self, pixels: Tensor, noise: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Pictures (B, 3, H, W) or clips (B, 3, T, H, W) → latents (B, C, [T,] h, w) in model space, fp32.

        Args:
            pixels: uint8, or float in [0, 1].
            noise: standard normal, of the latents' shape; keyed draws, for instance.
            generator: draws the noise where none is given.

        Raises:
            ConfigError: a posterior to sample from, and neither noise nor generator.
        """
        mean, std = self.moments(pixels)
        if self.posterior == "mode":
            return mean
        if noise is None:
            if generator is None:
                raise ConfigError("posterior", found="sample, without noise", expected="noise, or a generator")
            noise = torch.randn(mean.shape, generator=generator, device=generator.device)
        return mean + std * noise.to(mean)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, [T,] h, w) → float pictures (B, 3, H, W) or clips (B, 3, T, H, W), clamped to [0, 1]."""
        frames, clip = self._frames(latents)
        frames = self.scale.to_latent(frames).to(self.vae.device, self.vae.dtype)
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
