from __future__ import annotations

from importlib import resources

import numpy as np
import pytest
import torch

from acdit.data import DigitsDataset
from acdit.data.digits import held_out_mask
from acdit.errors import ConfigError


def test_the_packed_scans_are_those_of_scikit_learn() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    theirs = datasets.load_digits()
    with np.load(str(resources.files("acdit.data") / "builtin" / "digits.npz"), allow_pickle=False) as ours:
        assert np.array_equal(ours["images"], theirs.images)
        assert np.array_equal(ours["labels"], theirs.target)


def test_the_pack_is_small_and_says_where_it_comes_from() -> None:
    folder = resources.files("acdit.data") / "builtin"
    assert len((folder / "digits.npz").read_bytes()) < 100_000
    text = (folder / "README.md").read_text()
    assert "CC BY 4.0" in text
    assert "BSD 3-Clause" in text


def test_every_scan_is_in_exactly_one_split_and_classes_are_balanced() -> None:
    train, held_out = DigitsDataset("train"), DigitsDataset("held_out")
    assert (len(train), len(held_out)) == (1297, 500)
    assert torch.bincount(held_out.labels).tolist() == [50] * 10
    with np.load(str(resources.files("acdit.data") / "builtin" / "digits.npz"), allow_pickle=False) as arrays:
        whole = sorted(image.tobytes() + bytes([label]) for image, label in zip(*arrays.values(), strict=True))
    parts = [
        (image[0].int() * 16 / 255).round().to(torch.uint8).numpy().tobytes() + bytes([label])
        for split in (train, held_out)
        for image, label in (split[index] for index in range(len(split)))
    ]
    assert sorted(parts) == whole


def test_the_split_never_changes() -> None:
    with np.load(str(resources.files("acdit.data") / "builtin" / "digits.npz"), allow_pickle=False) as arrays:
        rows = np.flatnonzero(held_out_mask(arrays["labels"]))
    assert rows[:8].tolist() == [10, 11, 12, 13, 14, 15, 16, 17]
    assert int((rows * np.arange(1, 501)).sum() % 1_000_003) == 922_641


def test_items_are_gray_bytes_over_the_whole_range_with_their_digit() -> None:
    digits = DigitsDataset()
    image, label = digits[0]
    assert image.shape == digits.shape == (1, 8, 8)
    assert image.dtype == torch.uint8
    assert label in range(digits.num_classes)
    assert digits.class_names == [str(digit) for digit in range(10)]
    levels = torch.unique(digits.images)
    assert levels.tolist() == [round(level * 255 / 16 + 1e-9) for level in range(17)]


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ConfigError, match="held_out"):
        DigitsDataset("validation")
