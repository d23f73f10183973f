"""Picture files that the tests of data make."""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def png(value: int | np.ndarray = 0, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> bytes:
    """A picture of one red (or gray) value, or of an array."""
    if isinstance(value, int):
        picture = Image.new(mode, size, (value, 0, 0) if mode == "RGB" else value)
    else:
        picture = Image.fromarray(value)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header declares width × height pixels, and little else."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    """A plain tar of these members, in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


def sample(key: str, value: int | bytes, label: int | str) -> dict[str, bytes]:
    """A picture and its .cls as members of a shard."""
    return {f"{key}.png": png(value) if isinstance(value, int) else value, f"{key}.cls": str(label).encode()}
