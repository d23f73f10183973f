"""Idx files, the format of MNIST and its kin (https://yann.lecun.com/exdb/mnist): plain or gzipped."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Sequence
from math import prod
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from acdit.data.classes import ClassList, numbered
from acdit.data.picture import height_width, random_crop, require_channels, resize_and_crop
from acdit.errors import ConfigError, DataError

PREFIXES = {"train": "train", "test": "t10k"}
_UNSIGNED_BYTE = 0x08
_MAX_DEFLATE_RATIO = 1032  # no deflate stream unpacks to more than that


def read_idx(path: Path, ndim: int) -> np.ndarray:
    """Read an idx file of unsigned bytes.

    The header is believed only as far as the file's size bears it out: a header that declares more than the file can
    hold is refused before anything is allocated.

    Args:
        path: plain, or gzipped when it ends in .gz.
        ndim: how many dimensions it must have: 3 for pictures, 1 for labels.

    Returns:
        uint8 array.

    Raises:
        DataError: another format, another type or number of dimensions, truncated, or with bytes to spare.
    """
    size = path.stat().st_size
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            header = file.read(4)
            magic = bytes([0, 0, _UNSIGNED_BYTE, ndim])
            if header != magic:
                raise _bad(path, f"first bytes {header.hex(' ')}", f"{magic.hex(' ')} (unsigned bytes, {ndim} axes)")
            axes = file.read(4 * ndim)
            if len(axes) != 4 * ndim:
                raise _bad(path, "a truncated header", f"{ndim} sizes of 4 bytes")
            shape = tuple(int.from_bytes(axes[4 * axis : 4 * axis + 4], "big") for axis in range(ndim))
            expected = prod(shape)
            most = size * _MAX_DEFLATE_RATIO if path.suffix == ".gz" else size
            if expected == 0 or expected > most:
                raise _bad(path, f"a header that declares {shape}", f"1 … {most} bytes in a file of {size}")
            data = file.read(expected + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise _bad(path, f"unreadable data ({error})", "a whole idx file") from error
    if len(data) != expected:
        found = "bytes to spare after the data" if len(data) > expected else f"{len(data)} bytes of data"
        raise _bad(path, found, f"{expected} bytes, as the header's {shape} says")
    return np.frombuffer(data, dtype=np.uint8).reshape(shape)


def read_labelled(root: str | Path, split: str) -> tuple[np.ndarray, np.ndarray, str]:
    """Pictures and labels of a folder of idx files named as MNIST's.

    Args:
        root: folder with <prefix>-images-idx3-ubyte and <prefix>-labels-idx1-ubyte, or both with .gz.
        split: "train" (prefix train) or "test" (prefix t10k).

    Returns:
        uint8 (M, H, W); uint8 (M,); how messages name the labels' file.

    Raises:
        ConfigError: an unknown split.
        DataError: missing or malformed files, or counts that differ.
    """
    if split not in PREFIXES:
        raise ConfigError("data.split", found=repr(split), expected=f"one of {tuple(PREFIXES)} for idx files")
    images_path = _find(Path(root), f"{PREFIXES[split]}-images-idx3-ubyte")
    labels_path = _find(Path(root), f"{PREFIXES[split]}-labels-idx1-ubyte")
    images, labels = read_idx(images_path, 3), read_idx(labels_path, 1)
    if len(images) != len(labels):
        raise DataError(
            str(labels_path), found=f"{len(labels)} labels", expected=f"{len(images)}, as many as {images_path} has"
        )
    return images, labels, str(labels_path)


class IdxDataset:
    """Gray pictures and labels from a folder of idx files named as MNIST's.

    Args:
        root: folder with <prefix>-images-idx3-ubyte and <prefix>-labels-idx1-ubyte, or both with .gz.
        split: "train" (prefix train) or "test" (prefix t10k).
        channels: 1, or 3 to repeat the gray value.
        size: edge in pixels after resize and crop, or (H, W); None keeps the files' size.
        classes: names of the classes.

    Raises:
        ConfigError: an unknown split, channels other than 1 or 3, a size below 1.
        DataError: missing or malformed files, or counts that differ.
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        channels: int = 1,
        size: int | Sequence[int] | None = None,
        classes: ClassList | None = None,
    ) -> None:
        require_channels(channels)
        images, labels, where = read_labelled(root, split)
        self._images = images
        self.labels = torch.from_numpy(labels.astype(np.int64))
        """(M,) int64."""
        self._size = height_width(size)
        self.class_names = numbered(int(labels.max()) + 1, classes, where)
        self.num_classes = len(self.class_names)
        self.shape = (channels, *(self._size or images.shape[1:]))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """(C, H, W) uint8 and the label; cropped in the centre."""
        return self.cropped(index, None)

    def cropped(self, index: int, place: Sequence[float] | None) -> tuple[Tensor, int]:
        """As `[index]`, cropped where the draws `place` say (see `random_crop`)."""
        image = self._images[index]
        if self._size is not None and (place is not None or image.shape != self._size):
            picture = Image.fromarray(image)
            cut = resize_and_crop(picture, self._size) if place is None else random_crop(picture, self._size, place)
            image = np.asarray(cut)
        return torch.from_numpy(np.tile(image, (self.shape[0], 1, 1))), int(self.labels[index])


def _find(root: Path, name: str) -> Path:
    for path in (root / name, root / f"{name}.gz"):
        if path.is_file():
            return path
    raise DataError(
        f"data.root {root}",
        found=f"neither {name} nor {name}.gz" if root.is_dir() else "no such directory",
        expected="a folder with <train|t10k>-images-idx3-ubyte[.gz] and <train|t10k>-labels-idx1-ubyte[.gz]",
    )


def _bad(path: Path, found: str, expected: str) -> DataError:
    return DataError(str(path), found=found, expected=expected, fix="fetch or make the file again")
