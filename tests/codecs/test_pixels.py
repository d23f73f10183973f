from __future__ import annotations

import pytest
import torch

from acdit.codecs import PixelCodec
from acdit.codecs.pixels import shift_pictures


def test_the_default_maps_bytes_to_minus_one_and_one() -> None:
    encoded = PixelCodec().encode(torch.tensor([0, 51, 255], dtype=torch.uint8))
    assert encoded.dtype == torch.float32
    assert encoded.tolist() == pytest.approx([-1.0, -0.6, 1.0])


@pytest.mark.parametrize(("mean", "std"), [(0.5, 0.5), (0.3, 0.37)])
def test_every_byte_survives_the_round_trip(mean: float, std: float) -> None:
    codec = PixelCodec(mean, std)
    values = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    decoded = codec.decode(codec.encode(values))
    assert torch.equal((decoded * 255).round().to(torch.uint8), values)


def test_floats_are_taken_as_zero_to_one_in_their_own_precision() -> None:
    codec = PixelCodec(mean=0.25, std=0.5)
    values = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    assert torch.equal(codec.encode(values), (values - 0.25) / 0.5)
    assert codec.decode(codec.encode(values)).allclose(values, atol=1e-15)


def test_decoded_values_are_clamped() -> None:
    assert PixelCodec().decode(torch.tensor([-3.0, 0.0, 3.0])).tolist() == [0.0, 0.5, 1.0]


@pytest.mark.parametrize("shape", [(3, 2, 4, 5), (3, 3, 6, 4, 5)])
def test_pictures_and_whole_clips_are_mirrored_where_told(shape: tuple[int, ...]) -> None:
    data = torch.rand(shape)
    found = PixelCodec.flip(data, torch.tensor([True, False, True]))
    assert torch.equal(found[1], data[1])
    assert torch.equal(found[[0, 2]], data[[0, 2]].flip(-1))


@pytest.mark.parametrize("shape", [(5, 2, 4, 6), (5, 1, 3, 4, 6)])
@pytest.mark.parametrize("reach", [1, 3, 9])
def test_shifted_pictures_are_cut_from_ones_with_a_black_frame(shape: tuple[int, ...], reach: int) -> None:
    data = torch.randint(1, 256, shape, dtype=torch.uint8)
    offsets = torch.tensor([[0, 0], [reach, -1], [-reach, reach], [1, reach], [-1, -reach]])
    framed = torch.nn.functional.pad(data, (reach,) * 4)
    for index, (down, right) in enumerate(offsets.tolist()):
        top, left = reach - down, reach - right
        wanted = framed[index, ..., top : top + shape[-2], left : left + shape[-1]]
        assert torch.equal(shift_pictures(data, offsets)[index], wanted)
