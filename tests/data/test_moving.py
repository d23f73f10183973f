"""Moving digits: the motion that is promised, and nothing else in the picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from acdit.data.digits import DigitsDataset
from acdit.data.moving import BUILT_IN_SPEED, SPEED, MovingDigitsDataset, moving_digits, moving_idx
from acdit.errors import ConfigError, DataError
from tests.data.test_idx import idx, write

TRAIN = moving_digits()


def measured_centroids(clip: torch.Tensor) -> np.ndarray:
    """(T, 2) of the ink of a clip (1, T, H, W)."""
    ink = clip[0].double()
    rows, columns = torch.meshgrid(*map(torch.arange, ink.shape[1:]), indexing="ij")
    return torch.stack([(ink * axis).sum((1, 2)) / ink.sum((1, 2)) for axis in (rows, columns)], dim=1).numpy()


def test_clips_are_of_the_shape_and_number_that_is_said() -> None:
    clip, label = TRAIN[0]
    assert (tuple(clip.shape), clip.dtype) == ((1, 16, 16, 16), torch.uint8)
    assert (len(TRAIN), TRAIN.shape, TRAIN.num_classes) == (10_000, (1, 16, 16, 16), 10)
    assert label == int(TRAIN.labels[0])
    assert (torch.bincount(TRAIN.labels) > 800).all()
    assert tuple(moving_digits(frames=4, size=[10, 12])[3][0].shape) == (1, 4, 10, 12)
    with pytest.raises(IndexError):
        TRAIN[10_000]


def test_a_clip_follows_from_its_index_and_split_alone() -> None:
    again = moving_digits()
    assert all(torch.equal(again[index][0], TRAIN[index][0]) for index in (7, 3, 9_999))
    assert torch.equal(TRAIN[-1][0], TRAIN[9_999][0])
    assert torch.equal(moving_digits(frames=5)[7][0], TRAIN[7][0][:, :5])
    held_out = moving_digits("held_out")
    assert not np.allclose(held_out.motion(7).start, TRAIN.motion(7).start)
    assert len(held_out) == 1_000


def test_the_splits_share_no_digit() -> None:
    for split in ("train", "held_out"):
        pictures = {bytes(image) for image in DigitsDataset(split).images.numpy()}
        data = moving_digits(split)
        assert {bytes(data._images[data.motion(index).digits[0]]) for index in range(100)} <= pictures


def test_the_rendered_digit_is_where_its_track_says() -> None:
    for index in range(30):
        track = TRAIN.centroids(index)
        assert track.shape == (1, 16, 2)
        np.testing.assert_allclose(measured_centroids(TRAIN[index][0]), track[0], atol=1e-9)


def test_digits_stand_on_the_pixel_nearest_to_their_track() -> None:
    """Every frame holds the digit's own pixels, and nothing else."""
    for index in range(30):
        motion = TRAIN.motion(index)
        corners = motion.places(16)[0] * 8  # pixels of room
        for frame, corner in zip(TRAIN[index][0][0].numpy(), corners, strict=True):
            top, left = np.rint(corner).astype(int)
            assert np.abs(corner - (top, left)).max() <= 0.5
            expected = np.zeros((16, 16), np.uint8)
            expected[top : top + 8, left : left + 8] = TRAIN._images[motion.digits[0]]
            np.testing.assert_array_equal(frame, expected)


def test_velocity_is_constant_between_bounces_and_of_the_stated_speed() -> None:
    turned, between = 0, 0
    for index in range(200):
        motion = TRAIN.motion(index)
        assert BUILT_IN_SPEED[0] <= np.hypot(*motion.velocity[0]) <= BUILT_IN_SPEED[1]
        places = motion.places(16)[0]
        assert ((places >= 0) & (places <= 1)).all()
        steps = np.abs(np.diff(places, axis=0))
        whole = np.isclose(steps, np.abs(motion.velocity[0]), atol=1e-9)
        assert (steps <= np.abs(motion.velocity[0]) + 1e-9).all()
        turned, between = turned + (~whole).sum(), between + whole.sum()
    assert between > 0.8 * (between + turned)
    assert turned > 0  # some do bounce


def test_moving_mnist_has_its_own_speed(tmp_path: Path) -> None:
    write(tmp_path, idx(np.ones((6, 28, 28), np.uint8)), idx(np.arange(6, dtype=np.uint8)))
    data = moving_idx(tmp_path)
    for index in range(6):
        assert SPEED[0] <= np.hypot(*data.motion(index).velocity[0]) <= SPEED[1]


def test_a_digit_at_rest_on_a_whole_pixel_is_the_digit_itself() -> None:
    image = np.zeros((1, 4, 4), np.uint8)
    image[0, 1:3, 1:3] = [[255, 100], [50, 7]]
    data = MovingDigitsDataset(image, np.zeros(1), ["0"], stream="test", length=1, frames=2, size=4)
    assert torch.equal(data[0][0], torch.from_numpy(image)[None].expand(1, 2, 4, 4))


def test_two_digits_of_idx_files_move_through_each_other(tmp_path: Path) -> None:
    images = np.zeros((6, 28, 28), np.uint8)
    for digit, image in enumerate(images):
        image[8:20, 8:20] = 40 * (digit + 1)
    labels = np.array([3, 1, 0, 2, 1, 0], np.uint8)
    write(tmp_path, idx(images), idx(labels))
    data = moving_idx(tmp_path, frames=20, digits_per_clip=2, channels=3)
    clip, label = data[4]
    assert (tuple(clip.shape), len(data), data.num_classes) == ((3, 20, 64, 64), 6, 4)
    motion = data.motion(4)
    assert label == labels[motion.digits[0]]
    assert torch.equal(clip[0], clip[2])
    assert int(clip.max()) == images[motion.digits].max()  # the lighter is seen, nothing adds up
    apart = 0
    for index in range(6):
        digits, tracks = images[data.motion(index).digits].astype(float), data.centroids(index)
        assert tracks.shape == (2, 20, 2)
        measured, total = measured_centroids(data[index][0][:1]), digits.sum((1, 2))
        for frame in np.flatnonzero(np.abs(tracks[0] - tracks[1]).max(1) > 13):  # the ink is 12 pixels wide
            expected = (total[:, None] * tracks[:, frame]).sum(0) / total.sum()
            np.testing.assert_allclose(measured[frame], expected, atol=0.05)
            apart += 1
    assert apart > 10


@pytest.mark.parametrize(
    ("make", "error", "named"),
    [
        (lambda: moving_digits("test"), ConfigError, r"data\.split.*held_out"),
        (lambda: moving_digits(size=7), ConfigError, r"data\.size; found 7×7; expected at least 8×8"),
        (lambda: moving_digits(frames=0), ConfigError, r"data\.frames"),
        (lambda: moving_idx("/no/such"), DataError, r"data\.root /no/such"),
        (lambda: moving_idx("/no/such", "val"), ConfigError, r"data\.split"),
    ],
)
def test_what_cannot_be_is_refused(make: Any, error: type[Exception], named: str) -> None:
    with pytest.raises(error, match=named):
        make()
