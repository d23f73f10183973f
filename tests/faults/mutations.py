"""Picture files in every format, ways to damage them, and bombs: files that declare far more than they hold."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image

from tests.data.pictures import bomb


def _encoded(picture: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def seeds() -> dict[str, bytes]:
    """Sound files by name: every format that is read, and the forms in which decoders differ."""
    values = np.random.default_rng(0).integers(0, 256, (20, 24, 4), dtype=np.uint8)
    smooth = np.linspace(0, 255, 20 * 24, dtype=np.uint8).reshape(20, 24)
    colour, gray = Image.fromarray(values[..., :3]), Image.fromarray(smooth)
    frames = [Image.fromarray(values[..., channel]) for channel in range(3)]
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        "rgb.png": _encoded(colour, "PNG"),
        "gray.png": _encoded(gray, "PNG"),
        "palette.png": _encoded(colour.quantize(16), "PNG", transparency=0),
        "alpha.png": _encoded(Image.fromarray(values), "PNG"),
        "deep.png": _encoded(Image.fromarray(smooth.astype(np.uint16) * 257), "PNG"),
        "text.png": _encoded(gray, "PNG", exif=exif.tobytes()),
        "baseline.jpg": _encoded(colour, "JPEG", exif=exif.tobytes()),
        "progressive.jpg": _encoded(colour, "JPEG", progressive=True),
        "cmyk.jpg": _encoded(colour.convert("CMYK"), "JPEG"),
        "lossy.webp": _encoded(colour, "WEBP"),
        "lossless.webp": _encoded(Image.fromarray(values), "WEBP", lossless=True),
        "moving.webp": _encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        "still.gif": _encoded(colour.quantize(32), "GIF"),
        "moving.gif": _encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "raw.tif": _encoded(colour, "TIFF"),
        "lzw.tif": _encoded(colour, "TIFF", compression="tiff_lzw"),
        "deflate.tif": _encoded(gray, "TIFF", compression="tiff_adobe_deflate"),
        "rgb.bmp": _encoded(colour, "BMP"),
        "rgb.ppm": _encoded(colour, "PPM"),
    }


def damaged(data: bytes, rng: random.Random) -> bytes:
    """The file with one to three pieces of damage; the checksums of a PNG are made right again half of the time."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(max(1, min(len(changed), rng.choice((40, 10**9)))))  # headers as often as the rest
        length = rng.randint(1, 16)
        damage = rng.randrange(6)
        if damage == 0 and changed:
            changed[place] ^= 1 << rng.randrange(8)
        elif damage == 1:
            changed[place : place + length] = rng.randbytes(min(length, len(changed) - place))
        elif damage == 2:
            changed[place:place] = rng.randbytes(length)
        elif damage == 3:
            del changed[place : place + length]
        elif damage == 4:
            changed[place : place + 4] = rng.choice((b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff", b"\0\0\x20\0"))
        else:
            del changed[place:]
    return _checksums_made_right(bytes(changed)) if rng.random() < 0.5 else bytes(changed)


def _checksums_made_right(data: bytes) -> bytes:
    """So that damage in a PNG gets past its checksums, to the decoder."""
    if data[:8] != b"\x89PNG\r\n\x1a\n":
        return data
    made, place = bytearray(data), 8
    while place + 12 <= len(made):
        end = place + 8 + int.from_bytes(made[place : place + 4], "big")
        if end + 4 > len(made):
            break
        made[end : end + 4] = zlib.crc32(made[place + 4 : end]).to_bytes(4, "big")
        place = end + 4
    return bytes(made)


# --- bombs ------------------------------------------------------------------------------------------------------------


def _gif(canvas: tuple[int, int], frame: tuple[int, int]) -> bytes:
    header = b"GIF89a" + struct.pack("<HHBBB", *canvas, 0x80, 0, 0) + bytes(6)
    return header + b"," + struct.pack("<HHHHB", 0, 0, *frame, 0) + b"\x02\x02\x4c\x01\x00;"


def _webp_canvas(width: int, height: int) -> bytes:
    """An animation's canvas, around a picture of a few pixels."""
    small = _encoded(Image.new("RGB", (4, 4)), "WEBP", lossless=True)[12:]
    size = b"".join((edge - 1).to_bytes(3, "little") for edge in (width, height))
    frame = bytes(6) + (3).to_bytes(3, "little") * 2 + (100).to_bytes(3, "little") + b"\0" + small
    body = b"VP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + size + b"ANIM" + struct.pack("<IIH", 6, 0, 0)
    body += b"ANMF" + struct.pack("<I", len(frame)) + frame
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def _webp_lossless(width: int, height: int) -> bytes:
    data = bytearray(_encoded(Image.new("RGB", (4, 4)), "WEBP", lossless=True))
    place = data.index(b"VP8L") + 9
    data[place : place + 4] = struct.pack("<I", (width - 1) | (height - 1) << 14)
    return bytes(data)


def tiff(tags: dict[int, int], strip: bytes) -> bytes:
    """A little-endian TIFF of these tags; 273 and 324 (where the data are) are put in."""
    tags = {**tags, (324 if 322 in tags else 273): 8}
    body = strip + bytes(len(strip) % 2)
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    return b"II*\0" + struct.pack("<I", 8 + len(body)) + body + struct.pack("<H", len(tags)) + entries + bytes(4)


def _tiff_tile(edge: int) -> bytes:
    """A picture of 16×16 in one tile of edge×edge, all of it in the file, packed a thousand to one."""
    packer, packed = zlib.compressobj(9), b""
    for _ in range(edge):
        packed += packer.compress(bytes(edge))
    packed += packer.flush()
    tags = {256: 16, 257: 16, 258: 8, 259: 8, 262: 1, 277: 1, 322: edge, 323: edge, 325: len(packed)}
    return tiff(tags, packed)


def _png_chunk(kind: bytes, content: bytes) -> bytes:
    """A sound gray picture with one chunk more, behind its header."""
    sound = _encoded(Image.new("L", (8, 8)), "PNG")
    chunk = struct.pack(">I", len(content)) + kind + content
    return sound[:33] + chunk + struct.pack(">I", zlib.crc32(kind + content)) + sound[33:]


def _jpeg(width: int, height: int) -> bytes:
    data = bytearray(_encoded(Image.new("L", (8, 8)), "JPEG"))
    place = data.index(b"\xff\xc0") + 5
    data[place : place + 4] = struct.pack(">HH", height, width)
    return bytes(data)


_LONG = 200_000_000

PICTURE_BOMBS: dict[str, Callable[[], bytes]] = {
    "png of 50,000 × 50,000": lambda: bomb(50_000, 50_000),
    "png just above the limit": lambda: bomb(8193, 8192),
    "png of 2,147,483,647 × 1": lambda: bomb(2**31 - 1, 1),
    "png with a text that unpacks to 200 MB": lambda: _png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(_LONG), 9)),
    "png with a profile that unpacks to 200 MB": lambda: _png_chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(_LONG), 9)),
    "gif of 65,535 × 65,535": lambda: _gif((65535, 65535), (65535, 65535)),
    "gif of 4 × 4 with a frame of 65,535 × 65,535": lambda: _gif((4, 4), (65535, 65535)),
    "webp canvas of 16,384 × 16,384": lambda: _webp_canvas(16384, 16384),
    "webp canvas of 16,777,216 × 16": lambda: _webp_canvas(2**24, 16),
    "lossless webp of 16,384 × 16,384": lambda: _webp_lossless(16384, 16384),
    "tiff of 50,000 × 50,000": lambda: tiff(
        {256: 50_000, 257: 50_000, 258: 8, 259: 1, 262: 1, 277: 1, 278: 50_000, 279: 16}, bytes(16)
    ),
    "tiff of 16 × 16 in a tile of 20,000 × 20,000": lambda: _tiff_tile(20_000),
    "bmp of 50,000 × 50,000": lambda: b"BM" + struct.pack("<IIIIiiHHIIiiII", 70, 0, 54, 40, 50_000, 50_000, 1, 24,
                                                        0, 0, 0, 0, 0, 0) + bytes(16),
    "bmp of 50,000 × −50,000": lambda: b"BM" + struct.pack("<IIIIiiHHIIiiII", 70, 0, 54, 40, 50_000, -50_000, 1, 24,
                                                         0, 0, 0, 0, 0, 0) + bytes(16),
    "ppm of 50,000 × 50,000": lambda: b"P6 50000 50000 255\n" + bytes(16),
    "jpeg of 65,500 × 65,500": lambda: _jpeg(65500, 65500),
    "strip of 1,000,000 × 1": lambda: _encoded(Image.new("L", (1_000_000, 1)), "PNG"),
}  # fmt: skip
"""Each is refused, whatever it would take to decode it."""
