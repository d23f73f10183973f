from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from acdit.data import DigitsDataset, IdxDataset, ImagesDataset
from acdit.data.build import build_dataset
from acdit.errors import ConfigError
from acdit.recipe import DataRecipe, load_recipe


def test_the_shipped_recipes_name_data_that_fit_them(tmp_path: Path) -> None:
    digits = load_recipe("digits")
    data = build_dataset(digits.data)
    assert isinstance(data, DigitsDataset)
    assert data.shape == (digits.model.in_channels, *digits.model.grid)
    assert data.num_classes == digits.model.num_classes

    images, labels = np.zeros((12, 28, 28), np.uint8), (np.arange(12) % 10).astype(np.uint8)
    for name, array in (("images-idx3", images), ("labels-idx1", labels)):
        header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
        (tmp_path / f"train-{name}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))
    mnist = load_recipe("mnist", [f"data.root={tmp_path}"])
    data = build_dataset(mnist.data)
    assert isinstance(data, IdxDataset)
    assert data.shape == (mnist.model.in_channels, *mnist.model.grid)
    assert data.num_classes == mnist.model.num_classes


def test_images_are_built_with_every_setting(tmp_path: Path) -> None:
    for name in ("train/cat", "train/dog", "test/cat"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("RGB", (20, 10)).save(tmp_path / name / "a.png")
    recipe = DataRecipe(kind="images", root=str(tmp_path), split="test", size=8, channels=1, max_bad_files=2)
    data = build_dataset(recipe)
    assert isinstance(data, ImagesDataset)
    assert (len(data), data.shape, data.bad_files.limit) == (1, (1, 8, 8), 2)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"kind": "video"}, r"data\.kind"),
        ({"kind": "images"}, r"data\.root=/path"),
        ({"kind": "idx", "channels": 1}, r"data\.root=/path"),
        ({"kind": "digits", "channels": 3}, r"data\.channels"),
        ({"kind": "digits", "channels": 1, "size": 16}, r"data\.size"),
        ({"kind": "digits", "channels": 1, "root": "/data"}, r"data\.root"),
        ({"kind": "digits", "channels": 1, "max_bad_files": 1}, r"data\.max_bad_files"),
        ({"kind": "digits", "channels": 1, "split": "test"}, r"held_out"),
        ({"kind": "digits", "channels": 1, "crop": "random", "size": 8}, r"data\.crop"),
        ({"kind": "digits", "channels": 1, "classes": "classes.txt"}, r"data\.classes.*images or idx"),
        ({"kind": "images", "root": "/data", "streaming": True}, r"data\.streaming.*only data\.kind=hf"),
        ({"kind": "images", "root": "/data", "label_column": "class"}, r"data\.label_column"),
        ({"kind": "webdataset", "root": "/data", "shuffle_buffer": 5}, r"data\.shuffle_buffer"),
        ({"kind": "webdataset"}, r"data\.root=/path"),
        ({"kind": "hf", "root": "/data", "shuffle_buffer": 5}, r"data\.shuffle_buffer.*data\.streaming"),
        ({"kind": "images", "root": "/data", "crop": "random"}, r"data\.crop.*a size to crop to"),
    ],
)
def test_no_setting_is_silently_ignored(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        build_dataset(DataRecipe(**settings))
