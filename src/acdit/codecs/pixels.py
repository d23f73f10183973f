"""Pixels as they are: the codec of models without an autoencoder."""

from __future__ import annotations

import torch
from torch import Tensor


def flip_pictures(pictures: Tensor, flipped: Tensor) -> Tensor:
    """Mirror some pictures, or whole clips, left to right.

    Args:
        pictures: (B, C, [T,] H, W).
        flipped: (B,) booleans.
    """
    return torch.where(flipped.view(-1, *[1] * (pictures.ndim - 1)), pictures.flip(-1), pictures)


class PixelCodec:
    """Model space is (value − mean) / std of values in [0, 1]; the default maps them to [−1, 1].

    Args:
        mean, std: of one value in [0, 1].
    """

    def __init__(self, mean: float = 0.5, std: float = 0.5) -> None:
        self.mean, self.std = mean, std

    flip = staticmethod(flip_pictures)

    def noise_shape(self, data_shape: tuple[int, ...]) -> None:
        """Encoding draws nothing."""

    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """uint8, or float in [0, 1], of any shape → fp32 (or the given float dtype) in model space."""
        values = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels
        return (values - self.mean) / self.std

    def decode(self, data: Tensor) -> Tensor:
        """Model space → values clamped to [0, 1], same shape and dtype."""
        return (data * self.std + self.mean).clamp(0, 1)
