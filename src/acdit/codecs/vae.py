"""Latents of a diffusers autoencoder: pictures in [0, 1] ↔ model space, with the autoencoder's own scale and shift."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from acdit.codecs.autoencoders import LatentScale, latent_channels, require_frame_by_frame, spatial_factor
from acdit.codecs.pixels import flip_pictures
from acdit.errors import ConfigError

POSTERIORS = ("mode", "sample")
FRAMES_AT_ONCE = 16


class VAECodec:
    """Pictures ↔ latents of any diffusers autoencoder with `encode` and `decode`.

    Model space is (latent − shift) · scaling, as the autoencoder's config states them (`LatentScale`: also means and
    deviations per channel). Clips (B, C, T, H, W) are coded frame by frame, a few frames at a time: memory does not
    grow with them. Autoencoders without a posterior (`AutoencoderTiny`, `AutoencoderDC`, VQ) have standard deviation 0.

    Args:
        vae: `AutoencoderKL`, `AutoencoderTiny`, `AutoencoderDC` or another with their interface.
        posterior: "mode", or "sample": encoding then needs noise or a generator.
        frames_at_once: of clips; pictures are coded as they come.

    Raises:
        ConfigError: an unknown posterior, an autoencoder of videos, or contradicting scales in its config.
    """

    def __init__(self, vae: Any, posterior: str = "mode", frames_at_once: int = FRAMES_AT_ONCE) -> None:
        if posterior not in POSTERIORS:
            raise ConfigError("codec.posterior", found=repr(posterior), expected=f"one of {POSTERIORS}")
        require_frame_by_frame(vae)
        self.vae, self.posterior, self._frames_at_once = vae, posterior, frames_at_once
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
        frames, clip = self._frames(pixels)
        means, stds = zip(*map(self._posterior_of, self._parts(frames, clip)), strict=True)
        mean, std = self.scale.to_model(torch.cat(means)), self.scale.std_to_model(torch.cat(stds))
        return self._clips(mean, clip), self._clips(std, clip)

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
        return self._clips(torch.cat([self._pixels_of(part) for part in self._parts(frames, clip)]), clip)

    def _posterior_of(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the autoencoder's own latents, fp32."""
        pictures = pictures.float() / 255 if pictures.dtype == torch.uint8 else pictures
        encoded = self.vae.encode((pictures * 2 - 1).to(self.vae.device, self.vae.dtype))
        if hasattr(encoded, "latent_dist"):
            return encoded.latent_dist.mode().float(), encoded.latent_dist.std.float()
        # AutoencoderTiny and VQ say `latents`, AutoencoderDC says `latent`.
        mean = (encoded.latents if hasattr(encoded, "latents") else encoded.latent).float()
        return mean, torch.zeros_like(mean)

    def _pixels_of(self, latents: Tensor) -> Tensor:
        scaled = self.scale.to_latent(latents).to(self.vae.device, self.vae.dtype)
        return (self.vae.decode(scaled, return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)

    def _parts(self, frames: Tensor, clip: int | None) -> tuple[Tensor, ...]:
        return (frames,) if clip is None else frames.split(self._frames_at_once)

    @staticmethod
    def _frames(x: Tensor) -> tuple[Tensor, int | None]:
        if x.ndim == 4:
            return x, None
        return x.transpose(1, 2).flatten(0, 1), x.shape[2]

    @staticmethod
    def _clips(x: Tensor, frames: int | None) -> Tensor:
        return x if frames is None else x.unflatten(0, (-1, frames)).transpose(1, 2)
