"""Latents that were encoded beforehand: they are in model space already."""

from __future__ import annotations

import torch
from torch import Tensor


class CachedLatentsCodec:
    """What training does with a batch of cached latents (B, V, P, C, [T,] h, w), as `LatentsDataset` yields them.

    V views: the picture, and where cached the mirrored one. P parts: the latent, or mean and standard deviation of the
    posterior.

    Args:
        posterior: "sample" draws from mean and deviation; "mode" takes the first part.
    """

    def __init__(self, posterior: str = "mode") -> None:
        self.posterior = posterior

    @staticmethod
    def flip(stored: Tensor, flipped: Tensor) -> Tensor:
        """Pick the view: the mirrored one where `flipped` (B,) says so. (B, 2, P, …) → (B, 1, P, …)."""
        rows = torch.arange(len(stored), device=stored.device)
        return stored[rows, flipped.long()][:, None]

    def noise_shape(self, data_shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """Shape of the noise that `encode` wants for one sample (C, [T,] h, w); None: none."""
        return data_shape if self.posterior == "sample" else None

    def encode(self, stored: Tensor, noise: Tensor | None = None) -> Tensor:
        """(B, V, P, C, [T,] h, w) → fp32 (B, C, [T,] h, w), the first view."""
        parts = stored[:, 0].float()
        if self.posterior == "mode":
            return parts[:, 0]
        assert noise is not None  # `noise_shape` asks for it
        return parts[:, 0] + parts[:, 1] * noise.to(parts)
