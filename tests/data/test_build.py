from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from acdit.data import ClipsDataset, DigitsDataset, IdxDataset, ImagesDataset, MovingDigitsDataset
from acdit.data.build import as_measured, build_dataset
from acdit.data.frame_choice import FrameChoice
from acdit.errors import ConfigError
from acdit.recipe import DataRecipe, load_recipe
from tests.data.test_idx import idx, write


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


def test_clips_are_built_with_every_setting(tmp_path: Path) -> None:
    pytest.importorskip("av", reason="PyAV is in the extra video")
    from tests.data.videos import small_video

    small_video(tmp_path / "cat" / "a.avi")
    recipe = DataRecipe(
        kind="clips", root=str(tmp_path), size=8, channels=1, max_bad_files=2, frames=3, frame_stride=2, fps=5.0,
        start="first", short_clips="loop",
    )  # fmt: skip
    data = build_dataset(recipe)
    assert isinstance(data, ClipsDataset)
    assert (len(data), data.shape, data.bad_files.limit) == (1, (1, 3, 8, 8), 2)
    assert data.choice == FrameChoice(3, 2, 5.0, "first", "loop")
    (tmp_path / "list.txt").write_text("cat/a.avi 1\n")
    listed = build_dataset(DataRecipe(kind="clips", root=str(tmp_path), split_file=str(tmp_path / "list.txt")))
    assert listed.class_names == ["cat"]


def test_moving_digits_are_built_as_the_recipe_says(tmp_path: Path) -> None:
    still = build_dataset(DataRecipe(kind="moving_digits", channels=1, frames=5))
    assert isinstance(still, MovingDigitsDataset)
    assert (still.shape, len(still)) == ((1, 5, 16, 16), 10_000)
    assert len(build_dataset(DataRecipe(kind="moving_digits", channels=1, split="held_out", size=20))) == 1_000
    write(tmp_path, idx(np.full((4, 28, 28), 9, np.uint8)), idx(np.arange(4, dtype=np.uint8)), "t10k")
    (tmp_path / "names.txt").write_text("zero\none\ntwo\nthree\n")
    recipe = DataRecipe(
        kind="moving_idx", root=str(tmp_path), split="test", channels=1, digits_per_clip=2,
        classes=str(tmp_path / "names.txt"),
    )  # fmt: skip
    data = build_dataset(recipe)
    assert (data.shape, len(data), data.class_names[3]) == ((1, 16, 64, 64), 4, "three")
    assert len(data.motion(0).digits) == 2


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
        ({"kind": "clips"}, r"data\.root=/path"),
        (
            {"kind": "clips", "root": "/data", "digits_per_clip": 2},
            r"data\.digits_per_clip.*only data\.kind=moving_idx",
        ),
        ({"kind": "clips", "root": "/data", "streaming": True}, r"data\.streaming"),
        ({"kind": "clips", "root": "/data", "crop": "random"}, r"data\.crop.*a size to crop to"),
        ({"kind": "images", "root": "/data", "frames": 8}, r"data\.frames.*clips or moving_digits or moving_idx"),
        ({"kind": "images", "root": "/data", "start": "first"}, r"data\.start.*only data\.kind=clips"),
        ({"kind": "moving_idx", "root": "/data", "channels": 1, "fps": 8.0}, r"data\.fps"),
        ({"kind": "moving_idx", "root": "/data", "channels": 1, "crop": "random", "size": 64}, r"data\.crop"),
        ({"kind": "moving_idx", "channels": 1}, r"data\.root=/path"),
        ({"kind": "moving_digits", "channels": 1, "root": "/data"}, r"data\.root"),
        ({"kind": "moving_digits", "channels": 3}, r"data\.channels"),
        ({"kind": "moving_digits", "channels": 1, "classes": "a.txt"}, r"data\.classes"),
        ({"kind": "moving_digits", "channels": 1, "frame_stride": 2}, r"data\.frame_stride"),
        ({"kind": "moving_digits", "channels": 1, "short_clips": "loop"}, r"data\.short_clips"),
        ({"kind": "moving_digits", "channels": 1, "split_file": "a.txt"}, r"data\.split_file"),
    ],
)
def test_no_setting_is_silently_ignored(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        build_dataset(DataRecipe(**settings))


def test_what_training_draws_at_random_is_not_drawn_where_it_measures() -> None:
    trained = DataRecipe(kind="clips", root="x", flip=True, shift=3, crop="random", size=8)
    assert as_measured(trained, "val") == DataRecipe(kind="clips", root="x", size=8, start="center", split="val")
    latents = DataRecipe(kind="latents", root="x", shift=1)
    with pytest.raises(ConfigError, match="shift"):
        build_dataset(latents)
