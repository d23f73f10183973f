"""Arrays in npz files of strangers: nothing is unpickled, and what lies uncompressed is mapped instead of read."""

from __future__ import annotations

import hashlib
import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from acdit.errors import DataError

_OTHER_RANK = {
    4: "clips, uint8 (M, T, H, W, C), are measured with --frames N",
    5: "pictures, uint8 (M, H, W, C), are measured without --frames, by an extractor of frames",
}


def read_batch(path: Path, axes: str) -> tuple[np.ndarray, dict[str, Any] | None]:
    """Pixels of a file, and how they were drawn where it says so.

    Args:
        path: an npz with `arr_0`, uint8, channels last, C 1 or 3.
        axes: of it, "M, H, W, C" (ADM's batch form) or "M, T, H, W, C".

    Returns:
        The array, and its `settings` or None.

    Raises:
        DataError: no npz, no such array, another type or number of axes, nothing in it.
    """
    arrays, wanted = npz_arrays(path), axes.count(",") + 1
    if "arr_0" not in arrays:
        raise DataError(
            str(path), found=f"the arrays {', '.join(sorted(arrays)) or 'none'}", expected=f"arr_0: uint8 ({axes})"
        )
    array = arrays["arr_0"]()
    if array.dtype != np.uint8 or array.ndim != wanted or array.shape[-1] not in (1, 3):
        other = array.dtype == np.uint8 and array.ndim == 9 - wanted
        raise DataError(
            f"{path}: arr_0", found=f"{array.dtype} {array.shape}", expected=f"uint8 ({axes}) with C 1 or 3",
            fix=_OTHER_RANK[wanted] if other else "values 0 … 255, channels last",
        )  # fmt: skip
    if array.size == 0:
        raise DataError(f"{path}: arr_0", found=f"no pictures, {array.shape}", expected="at least one")
    settings = None
    if "settings" in arrays:
        try:
            settings = json.loads(str(arrays["settings"]()))
        except ValueError:
            settings = None
    return array, settings


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


def file_state(path: Path) -> bytes:
    """Size and time of a file: they change when it does."""
    status = path.stat()
    return f"{status.st_size} {status.st_mtime_ns}".encode()


def file_hash(path: Path) -> str:
    """Of `file_state`."""
    return hashlib.sha256(file_state(path)).hexdigest()[:32]
