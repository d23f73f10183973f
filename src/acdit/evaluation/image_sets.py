"""Pictures to measure: folders, zips, npz files, the built-in digits, or parts that sampling left."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from acdit.chunks import ChunkStore
from acdit.data import DigitsDataset
from acdit.data.digits import SPLITS
from acdit.data.picture import SUFFIXES, BadPicture, decode_picture
from acdit.data.sources import DirectorySource, ZipSource, is_hidden
from acdit.errors import ConfigError, DataError
from acdit.evaluation.npz_files import file_hash, file_state, read_batch

WANTED = "a folder or zip of pictures, an .npz with arr_0, or digits:train, digits:held_out"


class ImageSet(Protocol):
    """Pictures by index, all of one size."""

    @property
    def kind(self) -> Literal["frames"]:
        """What an index gives: one picture."""
        ...

    @property
    def description(self) -> dict[str, Any]:
        """What the pictures are, as JSON: equal descriptions, equal pictures."""
        ...

    @property
    def settings(self) -> dict[str, Any] | None:
        """How they were drawn, where that is recorded beside them."""
        ...

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> Tensor:
        """Pictures start … stop − 1, uint8 (n, C, H, W)."""
        ...

    def name(self, index: int) -> str:
        """How messages name a picture."""
        ...


def open_images(where: str, channels: int | None = None, size: int | None = None) -> ImageSet:
    """Open a set of pictures.

    Args:
        where: see `WANTED`.
        channels: 1 or 3: convert to it; None: gray pictures stay gray.
        size: resize and crop to this edge (files only); None: all pictures have the size of the first.

    Raises:
        DataError: nothing there, no pictures, a wrong npz.
        ConfigError: an unknown split of the digits, a size where nothing is resized.
    """
    if where.partition(":")[0] == "digits" and not Path(where).exists():
        return _Converted(_Digits(where.partition(":")[2] or "train"), channels, size)
    path = Path(where)
    if path.is_dir() or (path.is_file() and path.suffix.lower() == ".zip"):
        return _Files(path, channels, size)
    if path.is_file() and path.suffix.lower() == ".npz":
        return _Converted(_Npz(path), channels, size)
    found = "no such file or folder" if not path.exists() else "a file of another kind"
    raise DataError(where, found=found, expected=WANTED)


def stored_images(store: ChunkStore, channels: int | None = None) -> ImageSet:
    """The pictures of a finished store of `generate`."""
    return _Converted(StoredSamples(store), channels, None)


class _Files:
    """All pictures below a folder or in a zip, in sorted order of their paths."""

    kind: Literal["frames"] = "frames"

    def __init__(self, path: Path, channels: int | None, size: int | None) -> None:
        self._source: DirectorySource | ZipSource = DirectorySource(path) if path.is_dir() else ZipSource(path)
        self._channels, self._size = channels, size
        self._files = sorted(
            file for file in self._source.files if file.lower().endswith(SUFFIXES) and not is_hidden(file)
        )
        self.settings = settings_beside(path)
        if self.settings is not None:
            self._files = [file for file in self._files if file != "grid.png"]  # `acdit sample` leaves it there
        if not self._files:
            raise DataError(str(path), found="no pictures", expected=f"files that end in {', '.join(SUFFIXES)}")
        self._path = path
        self._shape: tuple[int, ...] | None = None

    @property
    def description(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        if isinstance(self._source, DirectorySource):
            for file in self._files:
                status = (self._path / file).stat()
                digest.update(f"{file} {status.st_size} {status.st_mtime_ns}\n".encode())
        else:
            digest.update(file_state(self._path))
        return {
            "kind": "files", "name": self._path.name, "count": len(self._files), "state": digest.hexdigest()[:32],
            "channels": self._channels, "size": self._size,
        }  # fmt: skip

    def __len__(self) -> int:
        return len(self._files)

    def name(self, index: int) -> str:
        return self._source.describe(self._files[index])

    def read(self, start: int, stop: int) -> Tensor:
        if self._shape is None:
            self._shape = tuple(self._one(0).shape)
        pictures = []
        for index in range(start, stop):
            picture = self._one(index)
            if tuple(picture.shape) != self._shape:
                raise DataError(
                    self.name(index), found=f"{picture.shape[2]}×{picture.shape[1]} pixels",
                    expected=f"{self._shape[2]}×{self._shape[1]}, as {self.name(0)} has",
                    fix="--size N resizes and crops every picture, or keep only pictures of one size there",
                )  # fmt: skip
            pictures.append(picture)
        return torch.stack(pictures)

    def _one(self, index: int) -> Tensor:
        try:
            return decode_picture(self._source.read(self._files[index]), self._channels or 3, self._size)
        except BadPicture as error:
            raise DataError(
                self.name(index), found=f"a bad picture ({error})", expected="one that can be read",
                fix="repair or remove it",
            ) from None  # fmt: skip


class _Npz:
    """ADM's batch form: `arr_0`, uint8 (M, H, W, C)."""

    kind: Literal["frames"] = "frames"

    def __init__(self, path: Path) -> None:
        self._path = path
        self._array, self.settings = read_batch(path, "M, H, W, C")
        self.description = {"kind": "npz", "name": path.name, "count": len(self), "state": file_hash(path)}

    def __len__(self) -> int:
        return len(self._array)

    def name(self, index: int) -> str:
        return f"{self._path}: arr_0[{index}]"

    def read(self, start: int, stop: int) -> Tensor:
        return torch.from_numpy(np.array(self._array[start:stop])).permute(0, 3, 1, 2).contiguous()


class _Digits:
    kind: Literal["frames"] = "frames"
    settings: dict[str, Any] | None = None

    def __init__(self, split: str) -> None:
        if split not in SPLITS:
            raise ConfigError(f"digits:{split}", found=f"the split {split!r}", expected=f"one of {', '.join(SPLITS)}")
        self._data = DigitsDataset(split)
        self.description = {"kind": "built-in digits", "name": f"digits:{split}", "count": len(self._data)}

    def __len__(self) -> int:
        return len(self._data)

    def name(self, index: int) -> str:
        return f"{self.description['name']}[{index}]"

    def read(self, start: int, stop: int) -> Tensor:
        return self._data.images[start:stop]


class StoredSamples:
    """What a store of `generate` holds, as it is: pictures, or clips (n, T, C, H, W)."""

    kind: Literal["frames"] = "frames"

    def __init__(self, store: ChunkStore) -> None:
        self._store = store
        self.settings: dict[str, Any] | None = store.description
        self.description = {"kind": "drawn", "count": store.total, **store.description}
        self._last = functools.lru_cache(maxsize=1)(lambda chunk: store.load(chunk)["images"])
        """Batches are read in order, several out of a chunk."""

    def __len__(self) -> int:
        return self._store.total

    def name(self, index: int) -> str:
        return f"picture {index}"

    def read(self, start: int, stop: int) -> Tensor:
        size = self._store.chunk_size
        first = start // size
        chunks = [self._last(chunk) for chunk in range(first, (stop - 1) // size + 1)]
        return torch.cat(chunks)[start - first * size : stop - first * size]


class _Converted:
    """A set with gray pictures as one channel or three equal ones, as wanted."""

    kind: Literal["frames"] = "frames"

    def __init__(self, images: ImageSet, channels: int | None, size: int | None) -> None:
        self._images, self._channels = images, channels
        self._given: int = images.read(0, 1).shape[1]
        if size is not None and tuple(images.read(0, 1).shape[2:]) != (size, size):
            height, width = images.read(0, 1).shape[2:]
            raise ConfigError(
                "--size", found=f"{size}, and {width}×{height} pixels in {images.description['name']}",
                expected="pictures that are files: only they are resized", fix="leave --size out, or give a folder",
            )  # fmt: skip

    @property
    def description(self) -> dict[str, Any]:
        return {**self._images.description, "channels": self._channels or self._given}

    @property
    def settings(self) -> dict[str, Any] | None:
        return self._images.settings

    def __len__(self) -> int:
        return len(self._images)

    def name(self, index: int) -> str:
        return self._images.name(index)

    def read(self, start: int, stop: int) -> Tensor:
        return with_channels(self._images.read(start, stop), self._channels, lambda index: self.name(start + index))


def with_channels(pixels: Tensor, channels: int | None, name: Callable[[int], str]) -> Tensor:
    """Gray pixels as one channel or three equal ones.

    Args:
        pixels: (n, C, H, W), or (n, T, C, H, W).
        channels: 1 or 3; None: as they are.
        name: how messages name the i-th of them.

    Raises:
        DataError: colour, where gray is wanted; it is named.
    """
    if channels is None or pixels.shape[-3] == channels:
        return pixels
    if channels == 3:
        return pixels.expand(*pixels.shape[:-3], 3, -1, -1)
    coloured = (pixels != pixels[..., :1, :, :]).flatten(1).any(dim=1)
    if bool(coloured.any()):
        raise DataError(
            name(int(coloured.nonzero()[0])), found="a picture in colour", expected="gray ones",
            fix="an extractor of colour pictures",
        )  # fmt: skip
    return pixels[..., :1, :, :]


def settings_beside(path: Path) -> dict[str, Any] | None:
    file = path / "settings.json"
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return settings if isinstance(settings, dict) else None
