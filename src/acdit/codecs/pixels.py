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


def shift_pictures(pictures: Tensor, offsets: Tensor) -> Tensor:
    """Move pictures, or whole clips; black (0) comes in where nothing was.

    Args:
        pictures: (B, C, [T,] H, W).
        offsets: (B, 2) integers: pixels down and to the right.
    """
    height, width = pictures.shape[-2:]
    moved = torch.zeros_like(pictures)
    for source, target, (down, right) in zip(pictures, moved, offsets.tolist(), strict=True):
        rows, columns = max(0, height - abs(down)), max(0, width - abs(right))
        top, left = max(0, -down), max(0, -right)
        cut = source[..., top : top + rows, left : left + columns]
        target[..., max(0, down) : max(0, down) + rows, max(0, right) : max(0, right) + columns] = cut
    return moved


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
