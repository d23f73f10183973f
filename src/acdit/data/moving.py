"""Moving digits: clips made by index out of still digits, after Moving MNIST (Srivastava et al. 2015).

A digit moves through a black canvas with constant velocity and bounces off its edges; as there, it is drawn on the
nearest whole pixel. Everything about a clip follows from its index alone (keyed draws), so nothing is stored, and where
the digits are is known: `centroids`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from acdit.data.classes import ClassList, numbered
from acdit.data.digits import DigitsDataset
from acdit.data.idx import read_labelled
from acdit.data.picture import height_width, require_channels
from acdit.draws import keyed_generator
from acdit.errors import ConfigError

SPEED = (0.05, 0.15)
"""Share of the room between a digit and the edges that it crosses in a frame, least and most; Moving MNIST has 0.1.
Drawn uniformly, in a uniform direction."""
BUILT_IN_SPEED = (0.1, 0.3)
"""The same of the built-in digits, which have a few pixels of room."""
CLIPS = {"train": 10_000, "held_out": 1_000}
"""Clips of the built-in digits, by split."""
_SEED = 0  # the data are the same in every run: runs differ in what they draw from them


@dataclass(frozen=True)
class Motion:
    """How the digits of one clip move. Places are shares of the room between a digit and the edges, (row, column)."""

    digits: np.ndarray
    """(K,) which still digits."""
    start: np.ndarray
    """(K, 2) in [0, 1)."""
    velocity: np.ndarray
    """(K, 2) shares a frame."""

    def places(self, frames: int) -> np.ndarray:
        """(K, T, 2) in [0, 1]: straight on, mirrored at 0 and 1."""
        straight = self.start[:, None] + self.velocity[:, None] * np.arange(frames)[None, :, None]
        return 1 - np.abs(1 - np.mod(straight, 2))


class MovingDigitsDataset:
    """A map from index to (uint8 clip, class); of several digits in a clip the first gives the class.

    Args:
        images: (M, h, w) uint8 digits, light on black.
        labels: (M,) their classes.
        class_names: of the classes.
        stream: names the draws: data sets with different names share no clips.
        length: clips.
        frames: T.
        size: edge of the canvas in pixels, or (H, W).
        digits_per_clip: digits that move through each other; where they meet, the lighter one is seen.
        channels: 1, or 3 to repeat the gray value.
        speed: see `SPEED`.

    Raises:
        ConfigError: a canvas smaller than a digit, channels other than 1 or 3, fewer than one frame or digit.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        class_names: Sequence[str],
        *,
        stream: str,
        length: int,
        frames: int = 16,
        size: int | Sequence[int] = 64,
        digits_per_clip: int = 1,
        channels: int = 1,
        speed: tuple[float, float] = SPEED,
    ) -> None:
        require_channels(channels)
        canvas = height_width(size)
        assert canvas is not None
        if any(edge < digit for edge, digit in zip(canvas, images.shape[1:], strict=True)):
            raise ConfigError(
                "data.size", found=f"{canvas[0]}×{canvas[1]}",
                expected=f"at least {images.shape[1]}×{images.shape[2]}, the size of a digit",
            )  # fmt: skip
        for name, count in (("frames", frames), ("digits_per_clip", digits_per_clip)):
            if count < 1:
                raise ConfigError(f"data.{name}", found=str(count), expected="at least 1")
        self._images, self._stream, self._speed = images, stream, speed
        self._digits = keyed_generator(_SEED, f"{stream}: digits").integers(len(images), size=(length, digits_per_clip))
        self._room = np.array(canvas) - images.shape[1:]
        self.labels = torch.from_numpy(labels.astype(np.int64)[self._digits[:, 0]])
        """(length,) int64."""
        self.class_names = list(class_names)
        self.num_classes = len(self.class_names)
        self.shape = (channels, frames, *canvas)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """(C, T, H, W) uint8 and the class."""
        motion = self.motion(index)
        channels, frames, height, width = self.shape
        canvas = np.zeros((frames, height, width), dtype=np.uint8)
        for digit, corners in zip(motion.digits, self._corners(motion), strict=True):
            picture = self._images[digit]
            for frame, (top, left) in zip(canvas, corners, strict=True):
                here = frame[top : top + picture.shape[0], left : left + picture.shape[1]]
                np.maximum(here, picture, out=here)
        clip = torch.from_numpy(canvas)
        return clip.expand(channels, -1, -1, -1).contiguous(), int(self.labels[index])

    def motion(self, index: int) -> Motion:
        """How the digits of a clip move.

        Raises:
            IndexError: no such clip.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        digits = self._digits[index]
        generator = keyed_generator(_SEED, f"{self._stream}: motion", sample=index)
        start = generator.random((len(digits), 2))
        speed = generator.uniform(*self._speed, len(digits))
        angle = generator.uniform(0, 2 * np.pi, len(digits))
        velocity = speed[:, None] * np.stack([np.sin(angle), np.cos(angle)], axis=1)
        return Motion(digits, start, velocity)

    def centroids(self, index: int) -> np.ndarray:
        """Where the digits of a clip are: (K, T, 2) centres of their ink, (row, column) in pixels, the centre of the
        first pixel being (0, 0)."""
        motion = self.motion(index)
        ink = np.stack([_centroid(self._images[digit]) for digit in motion.digits])
        return ink[:, None] + self._corners(motion)

    def _corners(self, motion: Motion) -> np.ndarray:
        """(K, T, 2) upper left corners, whole pixels."""
        return np.rint(motion.places(self.shape[1]) * self._room).astype(int)


def moving_digits(split: str = "train", frames: int = 16, size: int | Sequence[int] = 16) -> MovingDigitsDataset:
    """The built-in 8×8 digits in motion: 10,000 clips of training digits, or 1,000 of held-out ones.

    Args:
        split: "train" or "held_out"; no digit is in both.
        frames, size: as in `MovingDigitsDataset`.

    Raises:
        ConfigError: an unknown split, or what `MovingDigitsDataset` refuses.
    """
    still = DigitsDataset(split)
    return MovingDigitsDataset(
        still.images[:, 0].numpy(), still.labels.numpy(), still.class_names,
        stream=f"moving digits {split}", length=CLIPS[split], frames=frames, size=size, speed=BUILT_IN_SPEED,
    )  # fmt: skip


def moving_idx(
    root: str | Path,
    split: str = "train",
    frames: int = 16,
    size: int | Sequence[int] = 64,
    digits_per_clip: int = 1,
    channels: int = 1,
    classes: ClassList | None = None,
) -> MovingDigitsDataset:
    """Digits of idx files in motion (Moving MNIST), as many clips as there are digits.

    Args:
        root, split, channels, classes: as in `IdxDataset`.
        frames, size, digits_per_clip: as in `MovingDigitsDataset`.

    Raises:
        ConfigError, DataError: what `IdxDataset` and `MovingDigitsDataset` refuse.
    """
    images, labels, where = read_labelled(root, split)
    return MovingDigitsDataset(
        images, labels, numbered(int(labels.max()) + 1, classes, where), stream=f"moving idx {split}",
        length=len(images), frames=frames, size=size, digits_per_clip=digits_per_clip, channels=channels,
    )  # fmt: skip


def _centroid(image: np.ndarray) -> np.ndarray:
    """(row, column) of the ink's centre; of a blank picture its middle."""
    height, width = image.shape
    image = image.astype(np.float64)
    total = image.sum()
    if total == 0:
        return np.array([(height - 1) / 2, (width - 1) / 2])
    return np.array([image.sum(1) @ np.arange(height), image.sum(0) @ np.arange(width)]) / total
