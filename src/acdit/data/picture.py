"""One picture file → one uint8 tensor, without trusting the file.

The header is judged before a pixel is decoded: format, size, mode. Everything wrong with a file is a `BadPicture`.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
MAX_PIXELS = 2**26
"""A header that declares more (8192×8192) is refused: at 3 bytes a pixel it would decode to 200 MB."""
MAX_BYTES = 2**28
"""Larger files are refused unread."""

# A closed list: Pillow also knows formats that start other programs (EPS) or read other files.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_MODES = {1: "L", 3: "RGB"}


class BadPicture(Exception):
    """This file cannot be used; the message says why."""


def decode_picture(data: bytes, channels: int, size: int | None) -> Tensor:
    """Decode, convert, and resize with centre crop.

    Args:
        data: the file's bytes.
        channels: 1 (luma) or 3 (RGB; alpha is dropped).
        size: edge of the square result; None keeps the picture's own size.

    Returns:
        uint8 (C, H, W).

    Raises:
        BadPicture: not a picture, truncated, larger than `MAX_PIXELS`, or with values that do not fit 8 bits.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is lower, and refuses
            picture = Image.open(io.BytesIO(data), formats=_FORMATS)
        width, height = picture.size
        _require_sane_size(width, height, size)
        picture.load()
        converted = _eight_bits(picture).convert(_MODES[channels])
        return _as_tensor(converted if size is None else resize_and_crop(converted, size))
    except BadPicture:
        raise
    except Exception as error:  # decoders of damaged files raise OSError, SyntaxError, struct.error, MemoryError, …
        raise BadPicture(f"{type(error).__name__}: {error}") from error


def resize_and_crop(picture: Image.Image, size: int) -> Image.Image:
    """ADM's preprocessing (Dhariwal & Nichol 2021): halve with a box filter while twice too large, scale the shorter
    edge to `size` with a bicubic filter, crop the centre."""
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    scaled = (round(picture.width * scale), round(picture.height * scale))
    picture = picture.resize(scaled, Image.Resampling.BICUBIC)
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    return picture.crop((left, top, left + size, top + size))


def _require_sane_size(width: int, height: int, size: int | None) -> None:
    if width * height > MAX_PIXELS:
        raise BadPicture(f"the header declares {width}×{height} pixels, more than {MAX_PIXELS}")
    if size is not None and max(width, height) * size > MAX_PIXELS * min(width, height) / size:
        # A strip of 1×1,000,000 pixels passes the first test and would be scaled up to size × 1,000,000·size.
        raise BadPicture(f"{width}×{height} pixels is too long a strip to be scaled to a shorter edge of {size}")


def _eight_bits(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I;16"):  # Pillow's own conversion clips instead of scaling
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise BadPicture(f"mode {picture.mode!r} (32 bits a value) has no defined range")
    return picture


def _as_tensor(picture: Image.Image) -> Tensor:
    values = torch.from_numpy(np.array(picture))
    return values[None] if values.ndim == 2 else values.permute(2, 0, 1).contiguous()
