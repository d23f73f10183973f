"""The built-in real data: 1,797 handwritten digits of 8×8 pixels, carried in the package.

`builtin/README.md` states their source and licence.
"""

from __future__ import annotations

import io
from importlib import resources

import numpy as np
import torch
from torch import Tensor

from acdit.errors import ConfigError

SPLITS = ("train", "held_out")
HELD_OUT_PER_CLASS = 50
_LEVELS = 16  # the scans count dark cells of 4×4 squares: 0 … 16


def held_out_mask(labels: np.ndarray) -> np.ndarray:
    """Which digits are held out: of each class 50, evenly spaced in file order.

    The file goes writer by writer, so every writer and every class is on both sides. No random numbers: the split is
    the same with every library version.

    Args:
        labels: (M,) integers.

    Returns:
        (M,) booleans.
    """
    mask = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        mask[members[(2 * np.arange(HELD_OUT_PER_CLASS) + 1) * len(members) // (2 * HELD_OUT_PER_CLASS)]] = True
    return mask


class DigitsDataset:
    """1,297 digits to train on or 500 held out (50 a class).

    Args:
        split: "train" or "held_out".

    Raises:
        ConfigError: an unknown split.
    """

    def __init__(self, split: str = "train") -> None:
        if split not in SPLITS:
            raise ConfigError("data.split", found=repr(split), expected=f"one of {SPLITS} for the built-in digits")
        packed = (resources.files("acdit.data") / "builtin" / "digits.npz").read_bytes()
        with np.load(io.BytesIO(packed), allow_pickle=False) as arrays:
            levels, labels = arrays["images"], arrays["labels"]
        chosen = held_out_mask(labels) if split == "held_out" else ~held_out_mask(labels)
        # 0 … 16 → 0 … 255, rounded to nearest.
        scaled = (levels[chosen].astype(np.uint16) * 255 + _LEVELS // 2) // _LEVELS
        self.images = torch.from_numpy(scaled.astype(np.uint8))[:, None]
        """(M, 1, 8, 8) uint8."""
        self.labels = torch.from_numpy(labels[chosen].astype(np.int64))
        """(M,) int64."""
        self.num_classes = 10
        self.class_names = [str(digit) for digit in range(10)]
        self.shape = (1, 8, 8)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """(1, 8, 8) uint8 and the digit."""
        return self.images[index], int(self.labels[index])
