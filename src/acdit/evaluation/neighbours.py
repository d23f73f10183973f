"""How far pictures lie from the training data: memorised samples lie closer than unseen real pictures do."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def nearest_training_distance(pixels: Tensor, training_pixels: Tensor, chunk: int = 256) -> Tensor:
    """Euclidean distance of each picture to its nearest training picture.

    Args:
        pixels: (M, C, H, W), uint8 or float in [0, 1].
        training_pixels: (T, C, H, W), likewise.
        chunk: pictures compared at a time; bounds the memory at chunk × T distances.

    Returns:
        (M,) fp64, in units of pixel values in [0, 1].
    """
    rows, training = _flat(pixels), _flat(training_pixels)
    # Without the matrix-product shortcut: its cancellation would blur exact copies.
    exact = "donot_use_mm_for_euclid_dist"
    return torch.cat([torch.cdist(part, training, compute_mode=exact).amin(dim=1) for part in rows.split(chunk)])


def _flat(pixels: Tensor) -> Tensor:
    values = pixels.double() / 255 if pixels.dtype == torch.uint8 else pixels.double()
    return values.flatten(1)
