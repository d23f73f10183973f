"""Pictures to measure: folders, zips, npz files, the built-in digits, or parts that sampling left."""

from __future__ import annotations

import functools
import hashlib
import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from acdit.chunks import ChunkStore
from acdit.data import DigitsDataset
from acdit.data.digits import SPLITS
from acdit.data.picture import SUFFIXES, BadPicture, decode_picture
from acdit.data.sources import DirectorySource, ZipSource, is_hidden
from acdit.errors import ConfigError, DataError

WANTED = "a folder or zip of pictures, an .npz with arr_0, or digits:train, digits:held_out"


class ImageSet(Protocol):
    """Pictures by index, all of one size."""

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
    return _Converted(_Stored(store), channels, None)


class _Files:
    """All pictures below a folder or in a zip, in sorted order of their paths."""

    def __init__(self, path: Path, channels: int | None, size: int | None) -> None:
        self._source: DirectorySource | ZipSource = DirectorySource(path) if path.is_dir() else ZipSource(path)
        self._channels, self._size = channels, size
        self._files = sorted(
            file for file in self._source.files if file.lower().endswith(SUFFIXES) and not is_hidden(file)
        )
        self.settings = _settings_beside(path)
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
            digest.update(_file_state(self._path))
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
    """ADM's batch form: `arr_0`, uint8 (M, H, W, C). Where the file has it uncompressed it is mapped, not read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        arrays = npz_arrays(path)
        if "arr_0" not in arrays:
            raise DataError(
                str(path), found=f"the arrays {', '.join(sorted(arrays)) or 'none'}",
                expected="arr_0: uint8 (M, H, W, C), ADM's batch form",
            )  # fmt: skip
        self._array = arrays["arr_0"]()
        if self._array.dtype != np.uint8 or self._array.ndim != 4 or self._array.shape[3] not in (1, 3):
            raise DataError(
                f"{path}: arr_0", found=f"{self._array.dtype} {self._array.shape}",
                expected="uint8 (M, H, W, C) with C 1 or 3", fix="values 0 … 255, channels last",
            )  # fmt: skip
        if len(self._array) == 0:
            raise DataError(f"{path}: arr_0", found="no pictures", expected="at least one")
        self.settings: dict[str, Any] | None = None
        if "settings" in arrays:
            try:
                self.settings = json.loads(str(arrays["settings"]()))
            except ValueError:
                self.settings = None
        self.description = {"kind": "npz", "name": path.name, "count": len(self), "state": _file_hash(path)}

    def __len__(self) -> int:
        return len(self._array)

    def name(self, index: int) -> str:
        return f"{self._path}: arr_0[{index}]"

    def read(self, start: int, stop: int) -> Tensor:
        return torch.from_numpy(np.array(self._array[start:stop])).permute(0, 3, 1, 2).contiguous()


class _Digits:
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


class _Stored:
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
        pictures = self._images.read(start, stop)
        if self._given == 1:
            return pictures.expand(-1, self._channels or -1, -1, -1)
        if self._channels != 1:
            return pictures
        coloured = (pictures != pictures[:, :1]).flatten(1).any(dim=1)
        if bool(coloured.any()):
            raise DataError(
                self.name(start + int(coloured.nonzero()[0])), found="a picture in colour", expected="gray ones",
                fix="an extractor of colour pictures",
            )  # fmt: skip
        return pictures[:, :1]


def npz_arrays(path: Path) -> dict[str, Callable[[], np.ndarray]]:
    """Name → a function that gives the array; nothing in the file is unpickled.

    Raises:
        DataError: not an npz, or (when an array is asked for) a damaged one, or one of objects.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [entry for entry in archive.infolist() if entry.filename.endswith(".npy")]
    except Exception as error:  # BadZipFile, OSError, NotImplementedError, UnicodeDecodeError, struct.error
        raise DataError(str(path), found=f"not a readable npz ({error})", expected="what np.savez writes") from None
    return {entry.filename.removesuffix(".npy"): _reader(path, entry) for entry in entries}


def _reader(path: Path, entry: zipfile.ZipInfo) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        name = entry.filename.removesuffix(".npy")
        try:
            if entry.compress_type == zipfile.ZIP_STORED:
                return _mapped(path, entry)
            with np.load(path, allow_pickle=False) as arrays:
                return np.asarray(arrays[name])
        except Exception as error:  # BadZipFile, zlib.error, ValueError (objects), EOFError, struct.error
            raise DataError(
                f"{path}: {name}", found=f"unreadable ({type(error).__name__}: {error})",
                expected="an array of numbers or text", fix="get the file again",
            ) from None  # fmt: skip

    return read


def _mapped(path: Path, entry: zipfile.ZipInfo) -> np.ndarray:
    """An uncompressed array where it lies in the file."""
    with path.open("rb") as file:
        file.seek(entry.header_offset)
        local = struct.unpack("<4s5H3L2H", file.read(30))
        file.seek(local[9] + local[10], 1)
        start = file.tell()
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read_header(file)
        if dtype.hasobject:
            raise ValueError("an array of Python objects")
        offset = file.tell()
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if offset - start + size != entry.file_size:
        raise ValueError(f"{entry.file_size} bytes, {offset - start + size} declared")
    if size == 0:
        return np.zeros(shape, dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape, order="F" if fortran else "C")


def _settings_beside(path: Path) -> dict[str, Any] | None:
    file = path / "settings.json"
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return settings if isinstance(settings, dict) else None


def _file_state(path: Path) -> bytes:
    status = path.stat()
    return f"{status.st_size} {status.st_mtime_ns}".encode()


def _file_hash(path: Path) -> str:
    return hashlib.sha256(_file_state(path)).hexdigest()[:32]
