"""One picture file → one uint8 tensor, without trusting the file.

The header is judged before a pixel is decoded: format, size, mode. Everything wrong with a file is a `BadPicture`.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from PIL.TiffImagePlugin import TILELENGTH, TILEWIDTH, TiffImageFile
from torch import Tensor

from acdit.errors import ConfigError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
MAX_PIXELS = 2**26
"""A header that declares more (8192×8192) is refused: at 3 bytes a pixel it would decode to 200 MB."""
MAX_BYTES = 2**28
"""Larger files are refused unread."""
CROP_DRAWS = 3
"""Uniform draws that one random crop takes: scale, top, left."""

# A closed list: Pillow also knows formats that start other programs (EPS) or read other files.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_MODES = {1: "L", 3: "RGB"}
_LEAST_CROP = 0.8  # ADM's: a random crop shows 80 to 100 % of the shorter edge
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadPicture(Exception):
    """This file cannot be used; the message says why."""


def height_width(size: int | Sequence[int] | None) -> tuple[int, int] | None:
    """data.size as (H, W); one number is a square's edge.

    Raises:
        ConfigError: not one or two positive numbers.
    """
    if size is None:
        return None
    edges = [size, size] if isinstance(size, int) else list(size)
    if len(edges) != 2 or min(edges) < 1:
        raise ConfigError("data.size", found=repr(size), expected="a positive number of pixels, or [height, width]")
    return edges[0], edges[1]


def require_channels(channels: int) -> None:
    """Refuse what is neither gray nor RGB.

    Raises:
        ConfigError: channels other than 1 or 3.
    """
    if channels not in _MODES:
        raise ConfigError("data.channels", found=str(channels), expected="1 or 3")


def decode_picture(
    data: bytes, channels: int, size: int | Sequence[int] | None, place: Sequence[float] | None = None
) -> Tensor:
    """Decode, turn upright (EXIF), convert, resize and crop.

    Args:
        data: the file's bytes.
        channels: 1 (luma) or 3 (RGB; alpha is dropped, CMYK and palettes are converted).
        size: edge of the square result, or (H, W); None keeps the picture's own size.
        place: draws of a random crop (see `random_crop`); None crops the centre.

    Returns:
        uint8 (C, H, W).

    Raises:
        BadPicture: not a picture, truncated, larger than `MAX_PIXELS`, or with values that do not fit 8 bits.
    """
    wanted = height_width(size)
    try:
        picture = _opened(data)
        if picture.width * picture.height > MAX_PIXELS:
            raise BadPicture(f"the header declares {picture.width}×{picture.height} pixels, more than {MAX_PIXELS}")
        _require_small_tiles(picture)
        if wanted is not None:
            require_no_strip(*picture.size, wanted)
        picture.load()
        upright = _UPRIGHT.get(_orientation(picture))
        picture = _eight_bits(picture)
        if upright is not None:
            picture = picture.transpose(upright)
        return fitted(picture, channels, wanted, place)
    except BadPicture:
        raise
    except Exception as error:  # decoders of damaged files raise OSError, SyntaxError, struct.error, MemoryError, …
        raise BadPicture(f"{type(error).__name__}: {error}") from error


def fitted(
    picture: Image.Image, channels: int, size: tuple[int, int] | None, place: Sequence[float] | None = None
) -> Tensor:
    """Convert, resize and crop a picture, or a frame of a clip, whose header was judged.

    Args:
        picture: upright, 8 bits a value.
        channels: 1 or 3.
        size: (H, W); None keeps the picture's own.
        place: draws of a random crop (see `random_crop`); None crops the centre.

    Returns:
        uint8 (C, H, W).
    """
    picture = picture.convert(_MODES[channels])
    if size is not None:
        picture = resize_and_crop(picture, size) if place is None else random_crop(picture, size, place)
    return _as_tensor(picture)


def header_size(data: bytes) -> tuple[int, int]:
    """(H, W) that the header declares; nothing is decoded.

    Raises:
        BadPicture: not a picture.
    """
    try:
        picture = _opened(data)
    except Exception as error:
        raise BadPicture(f"{type(error).__name__}: {error}") from error
    return picture.height, picture.width


def _opened(data: bytes) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of bombs: our own limit is lower, and refuses; of damaged EXIF: see below
        return Image.open(io.BytesIO(data), formats=_FORMATS)


def resize_and_crop(picture: Image.Image, size: int | Sequence[int]) -> Image.Image:
    """ADM's preprocessing (Dhariwal & Nichol 2021): halve with a box filter while twice too large, scale with a
    bicubic filter until the shorter edge fits, crop the centre. For (H, W) both edges have to cover theirs."""
    height, width = height_width(size) or picture.size[::-1]
    picture = _cover(picture, height, width)
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))


def random_crop(picture: Image.Image, size: int | Sequence[int], place: Sequence[float]) -> Image.Image:
    """ADM's random crop: scaled so that the result shows 80 to 100 % of the shorter edge, then cut out anywhere.

    Args:
        picture: any size.
        size: edge of the square result, or (H, W).
        place: `CROP_DRAWS` uniform draws in [0, 1): scale, top, left.
    """
    height, width = height_width(size) or picture.size[::-1]
    shorter = min(height, width)
    enlarged = shorter + int(place[0] * (math.ceil(shorter / _LEAST_CROP) - shorter + 1))
    picture = _cover(picture, round(height * enlarged / shorter), round(width * enlarged / shorter))
    top, left = int(place[1] * (picture.height - height + 1)), int(place[2] * (picture.width - width + 1))
    return picture.crop((left, top, left + width, top + height))


def _cover(picture: Image.Image, height: int, width: int) -> Image.Image:
    """The smallest scaled copy that covers height × width."""
    while picture.height >= 2 * height and picture.width >= 2 * width:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = max(height / picture.height, width / picture.width)
    scaled = (round(picture.width * scale), round(picture.height * scale))
    return picture.resize(scaled, Image.Resampling.BICUBIC)


def _require_small_tiles(picture: Image.Image) -> None:
    # A TIFF of 16×16 pixels may lie in one tile of 20,000×20,000, which the decoder unpacks whole.
    if isinstance(picture, TiffImageFile):
        width, height = (int(picture.tag_v2.get(tag, 0)) for tag in (TILEWIDTH, TILELENGTH))
        if width * height > MAX_PIXELS:
            raise BadPicture(f"a tile of {width}×{height} pixels, more than {MAX_PIXELS}")


def require_no_strip(width: int, height: int, wanted: tuple[int, int]) -> None:
    """Refuse what scaling would blow up.

    Raises:
        BadPicture: more than `MAX_PIXELS` once `wanted` (H, W) is covered.
    """
    # A strip of 1×1,000,000 pixels passes the first test and would be scaled up to size × 1,000,000·size. EXIF may
    # exchange width and height: the wider of both readings counts.
    scale = max(wanted) / min(width, height)
    if width * scale * height * scale > MAX_PIXELS:
        raise BadPicture(f"{width}×{height} pixels is too long a strip to be scaled to {wanted[0]}×{wanted[1]}")


def _orientation(picture: Image.Image) -> int:
    """EXIF's orientation, 1 … 8; 1 (upright) where the EXIF data are damaged: the picture itself is whole."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return int(picture.getexif().get(_ORIENTATION, 1))
    except Exception:  # whatever a damaged block raises
        return 1


def _eight_bits(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I;16"):  # Pillow's own conversion clips instead of scaling
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.mode == "I" and picture.format == "PPM":  # Pillow's reader scales PGM's levels to 16 bits
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise BadPicture(f"mode {picture.mode!r} (32 bits a value) has no defined range")
    return picture


def _as_tensor(picture: Image.Image) -> Tensor:
    values = torch.from_numpy(np.array(picture))
    return values[None] if values.ndim == 2 else values.permute(2, 0, 1).contiguous()
