"""What a picture becomes: ADM's crops bit for bit, and every kind of file that pictures come in."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageOps

from acdit.data.picture import BadPicture, decode_picture, random_crop, resize_and_crop
from tests.data.pictures import png


def noise(height: int, width: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)


def encoded(picture: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def adm_centre_crop(picture: Image.Image, size: int) -> np.ndarray:
    """As published: openai/guided-diffusion, image_datasets.py."""
    while min(*picture.size) >= 2 * size:
        picture = picture.resize(tuple(x // 2 for x in picture.size), resample=Image.BOX)
    scale = size / min(*picture.size)
    picture = picture.resize(tuple(round(x * scale) for x in picture.size), resample=Image.BICUBIC)
    array = np.array(picture)
    y, x = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[y : y + size, x : x + size]


@pytest.mark.parametrize("shape", [(50, 70), (16, 16), (9, 31), (130, 67), (32, 33), (31, 64), (500, 375)])
def test_resize_and_crop_is_adms(shape: tuple[int, int]) -> None:
    array = noise(*shape)
    ours = np.asarray(resize_and_crop(Image.fromarray(array), 16))
    assert np.array_equal(ours, adm_centre_crop(Image.fromarray(array), 16))
    assert decode_picture(png(array), 3, 16).permute(1, 2, 0).equal(torch.from_numpy(ours.copy()))
    assert decode_picture(png(array), 3, [16, 16]).permute(1, 2, 0).equal(torch.from_numpy(ours.copy()))


def test_channels_say_gray_or_colour() -> None:
    red = png(200)
    assert decode_picture(red, 1, None).shape == (1, 8, 8)
    assert int(decode_picture(red, 1, None)[0, 0, 0]) == round(200 * 0.299)
    assert decode_picture(png(7, mode="L"), 3, None)[:, 0, 0].tolist() == [7, 7, 7]
    with_alpha = np.dstack([np.full((4, 4, 3), 50, np.uint8), np.zeros((4, 4), np.uint8)])
    assert decode_picture(png(with_alpha), 3, None)[:, 0, 0].tolist() == [50, 50, 50]


def test_sixteen_bit_gray_is_scaled_not_clipped() -> None:
    values = (np.arange(16, dtype=np.uint16) * 4096).reshape(4, 4)
    assert decode_picture(png(values), 1, None).flatten().tolist() == [16 * level for level in range(16)]


def test_sixteen_bits_mean_the_same_in_every_format() -> None:
    values = (np.arange(16, dtype=np.uint16) * 4096).reshape(4, 4)
    for format in ("PNG", "TIFF", "PPM"):
        data = encoded(Image.fromarray(values), format)
        assert decode_picture(data, 1, None).flatten().tolist() == [16 * level for level in range(16)], format


def test_palettes_are_looked_up() -> None:
    picture = Image.fromarray(noise(8, 8) // 128 * 255).quantize(8)
    expected = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
    for format in ("PNG", "GIF", "BMP"):
        assert decode_picture(encoded(picture, format), 3, None).equal(expected), format
    see_through = encoded(picture, "PNG", transparency=0)
    assert decode_picture(see_through, 3, None).equal(expected)


def test_cmyk_becomes_rgb() -> None:
    cyan, red = Image.new("CMYK", (8, 8), (255, 0, 0, 0)), Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    for format in ("TIFF", "JPEG"):
        assert decode_picture(encoded(cyan, format), 3, None)[:, 4, 4].tolist() == pytest.approx([0, 255, 255], abs=3)
        assert decode_picture(encoded(red, format), 3, None)[:, 4, 4].tolist() == pytest.approx([255, 0, 0], abs=3)


def test_alpha_is_dropped_in_gray_too() -> None:
    picture = Image.fromarray(np.dstack([np.full((4, 4), 90, np.uint8), np.zeros((4, 4), np.uint8)]), "LA")
    assert decode_picture(encoded(picture, "PNG"), 1, None).unique().tolist() == [90]


def test_lab_becomes_rgb() -> None:
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    lab = ImageCms.applyTransform(Image.new("RGB", (8, 8), (200, 40, 90)), to_lab)
    found = decode_picture(encoded(lab, "TIFF"), 3, None)
    assert found[:, 4, 4].tolist() == pytest.approx([200, 40, 90], abs=4)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_the_picture_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(noise(6, 9)), "PNG", exif=exif.tobytes())
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    found = decode_picture(data, 3, None)
    assert found.shape == ((3, 9, 6) if orientation > 4 else (3, 6, 9))
    assert found.permute(1, 2, 0).equal(torch.from_numpy(np.array(expected)))


def test_damaged_exif_does_not_cost_the_picture() -> None:
    for exif in (b"Exif\0\0nonsense", b"Exif\0\0MM\0*\xff\xff\xff\xff"):
        data = encoded(Image.fromarray(noise(6, 9)), "JPEG", exif=exif)
        assert decode_picture(data, 3, None).shape == (3, 6, 9)


@pytest.mark.parametrize("shape", [(50, 70), (70, 50), (24, 12), (12, 40)])
def test_a_size_of_two_edges_is_covered_and_cut(shape: tuple[int, int]) -> None:
    """Both edges reach theirs, one exactly; what sticks out is cut evenly."""
    array = noise(*shape)
    ours = np.asarray(resize_and_crop(Image.fromarray(array), (12, 20)))
    picture = Image.fromarray(array)
    while picture.height >= 24 and picture.width >= 40:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = max(12 / picture.height, 20 / picture.width)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)
    assert picture.width >= 20
    assert picture.height >= 12
    top, left = (picture.height - 12) // 2, (picture.width - 20) // 2
    assert np.array_equal(ours, np.asarray(picture)[top : top + 12, left : left + 20])


def adm_random_crop(picture: Image.Image, size: int, draws: tuple[float, float, float]) -> np.ndarray:
    """ADM's random_crop_arr with min_crop_frac 0.8, its three draws handed in."""
    sizes = range(math.ceil(size / 1.0), math.ceil(size / 0.8) + 1)
    edge = sizes[int(draws[0] * len(sizes))]
    while min(*picture.size) >= 2 * edge:
        picture = picture.resize(tuple(x // 2 for x in picture.size), resample=Image.BOX)
    scale = edge / min(*picture.size)
    array = np.array(picture.resize(tuple(round(x * scale) for x in picture.size), resample=Image.BICUBIC))
    y, x = (
        range(extent - size + 1)[int(u * (extent - size + 1))]
        for extent, u in zip(array.shape[:2], draws[1:], strict=True)
    )
    return array[y : y + size, x : x + size]


@pytest.mark.parametrize("place", [(0.0, 0.0, 0.0), (0.999, 0.999, 0.999), (0.5, 0.2, 0.8), (0.3, 0.9, 0.1)])
@pytest.mark.parametrize("shape", [(50, 70), (16, 16), (130, 67)])
def test_a_random_crop_is_adms(shape: tuple[int, int], place: tuple[float, float, float]) -> None:
    picture = Image.fromarray(noise(*shape))
    assert np.array_equal(np.asarray(random_crop(picture, 16, place)), adm_random_crop(picture, 16, place))
    assert decode_picture(png(noise(*shape)), 3, [16, 24], place).shape == (3, 16, 24)


def test_values_without_a_range_are_refused() -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((4, 4), np.float32)).save(buffer, "TIFF")
    with pytest.raises(BadPicture, match="no defined range"):
        decode_picture(buffer.getvalue(), 1, None)
