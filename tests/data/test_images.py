"""Class folders in directories and zips: rows 20, 22 and 23 of the reliability bar."""

from __future__ import annotations

import io
import logging
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from acdit.data import ImagesDataset
from acdit.data.picture import BadPicture, decode_picture
from acdit.errors import ConfigError, DataError
from tests.data.pictures import bomb, png


def write_directory(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def write_zip(root: Path, files: dict[str, bytes]) -> Path:
    path = root / "data.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


Write = Callable[[Path, dict[str, bytes]], Path]
both = pytest.mark.parametrize("write", [write_directory, write_zip])
CATS_AND_DOGS = {"cat/b.png": png(2), "cat/a.png": png(1), "dog/deep/c.png": png(3)}


def reds(data: ImagesDataset) -> list[int]:
    return [int(data[index][0][0, 0, 0]) for index in range(len(data))]


@both
@pytest.mark.parametrize("prefix", ["", "train/"])
def test_classes_are_folders_in_sorted_order(tmp_path: Path, write: Write, prefix: str) -> None:
    data = ImagesDataset(write(tmp_path, {prefix + name: content for name, content in CATS_AND_DOGS.items()}))
    assert data.class_names == ["cat", "dog"]
    assert data.num_classes == 2
    assert data.shape == (3, 8, 8)
    assert reds(data) == [1, 2, 3]
    assert [data[index][1] for index in range(3)] == [0, 0, 1]
    assert data[0][0].dtype == torch.uint8


@both
def test_the_split_names_the_folder_above_the_classes(tmp_path: Path, write: Write) -> None:
    root = write(tmp_path, {**{f"train/{k}": v for k, v in CATS_AND_DOGS.items()}, "val/cat/x.png": png(9)})
    assert reds(ImagesDataset(root, split="val")) == [9]
    assert len(ImagesDataset(root)) == 3
    with pytest.raises(DataError, match=r"test.*train.*val"):
        ImagesDataset(root, split="test")


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    root = write_directory(tmp_path, {"train/a.png": png(1), "plane/a.png": png(2)})
    assert ImagesDataset(root).class_names == ["plane", "train"]


def test_a_zip_may_wrap_everything_in_one_folder(tmp_path: Path) -> None:
    root = write_zip(tmp_path, {f"pets-1.0/train/{k}": v for k, v in CATS_AND_DOGS.items()})
    assert ImagesDataset(root).class_names == ["cat", "dog"]


def test_a_zip_of_one_class_is_not_taken_for_a_wrapper(tmp_path: Path) -> None:
    assert ImagesDataset(write_zip(tmp_path, {"cat/a.png": png(1)})).class_names == ["cat"]


@pytest.mark.parametrize(
    ("files", "classes"),
    [
        (("a/deep/x.png", "b/y.png"), ["a", "b"]),  # two folders wrap nothing
        (("pack/deep/x.png", "top.png"), ["pack"]),  # nor does one with pictures beside it
        (("cat/deep/x.png", "cat/y.png"), ["cat"]),  # or in it
        (("pack/cat/x.png",), ["cat"]),
    ],
)
def test_what_a_zip_wraps(tmp_path: Path, files: tuple[str, ...], classes: list[str]) -> None:
    assert ImagesDataset(write_zip(tmp_path, {name: png(1) for name in files})).class_names == classes
    with pytest.raises(DataError, match=r"pack; found a class folder without pictures"):
        ImagesDataset(write_zip(tmp_path, {"pack/readme.txt": b"x"}))


def test_a_directory_wraps_nothing_and_suffixes_may_be_large(tmp_path: Path) -> None:
    data = ImagesDataset(write_directory(tmp_path, {"cat/deep/x.PNG": png(1)}))
    assert (data.class_names, len(data)) == (["cat"], 1)


@both
def test_hidden_files_and_folders_are_no_data(tmp_path: Path, write: Write, caplog: pytest.LogCaptureFixture) -> None:
    extra = {".cache/a.png": png(7), "cat/.hidden.png": png(8), "cat/.x/a.png": png(8), "__MACOSX/cat/a.png": b"?"}
    with caplog.at_level(logging.WARNING):
        data = ImagesDataset(write(tmp_path, {**CATS_AND_DOGS, **extra, "cat/notes.txt": b"x"}))
    assert data.class_names == ["cat", "dog"]
    assert reds(data) == [1, 2, 3]
    assert ".cache" in caplog.text
    assert "1 files that are no pictures" in caplog.text


# --- row 20: empty, wrong or hidden class folders ----------------------------------------------------------------


@both
@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({"loose.png": png()}, "pictures outside any class folder"),
        ({"readme.txt": b"x"}, "no class folders"),
        ({".cat/a.png": png()}, r"hidden ones: \['\.cat'\]"),
        ({**CATS_AND_DOGS, "fox/a.txt": b"x"}, "fox; found a class folder without pictures"),
    ],
)
def test_a_wrong_layout_is_named_with_the_expected_one(
    tmp_path: Path, write: Write, files: dict[str, bytes], named: str
) -> None:
    with pytest.raises(DataError, match=named) as caught:
        ImagesDataset(write(tmp_path, files))
    assert str(tmp_path) in str(caught.value)
    assert "<root>/<class>/*.png" in str(caught.value)
    assert caught.value.exit_code == 3


def test_an_empty_class_folder_is_named(tmp_path: Path) -> None:
    root = write_directory(tmp_path, CATS_AND_DOGS)
    (root / "fox").mkdir()
    with pytest.raises(DataError, match=str(root / "fox")):
        ImagesDataset(root)


def test_a_missing_root_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or directory"):
        ImagesDataset(tmp_path / "nowhere")


def test_a_link_back_to_the_root_does_not_go_round_for_ever(tmp_path: Path) -> None:
    root = write_directory(tmp_path, CATS_AND_DOGS)
    (root / "cat" / "again").symlink_to(root, target_is_directory=True)
    assert reds(ImagesDataset(root)) == [1, 2, 3]


# --- row 22: corrupt pictures ------------------------------------------------------------------------------------

NOISE = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(NOISE).save(buffer, "JPEG")
    return buffer.getvalue()


BAD = {
    "truncated png": png(NOISE)[:900],
    "truncated jpeg": jpeg()[:500],
    "flipped bytes": bytes(byte ^ 0x55 if 400 < place < 480 else byte for place, byte in enumerate(png(NOISE))),
    "text": b"this is no picture",
    "empty": b"",
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n",
}


@both
@pytest.mark.parametrize("kind", BAD)
def test_a_corrupt_picture_is_named_and_stops_the_run(tmp_path: Path, write: Write, kind: str) -> None:
    data = ImagesDataset(write(tmp_path, {**CATS_AND_DOGS, "cat/b.png": BAD[kind]}))
    with pytest.raises(DataError, match=r"cat/b\.png.*at most 0 bad files") as caught:
        reds(data)
    assert caught.value.exit_code == 3


def test_bad_pictures_are_skipped_up_to_the_limit_and_the_next_of_the_class_takes_their_place(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = {f"cat/{name}.png": png(value) for value, name in enumerate("abcd", start=1)} | {"dog/a.png": png(9)}
    files |= {"cat/b.png": b"", "cat/d.png": b""}
    root = write_directory(tmp_path, files)
    forwards = ImagesDataset(root, max_bad_files=2)
    with caplog.at_level(logging.WARNING):
        assert reds(forwards) == [1, 3, 3, 1, 9]
    assert len(forwards.bad_files) == 2
    assert "b.png" in caplog.text
    backwards = ImagesDataset(root, max_bad_files=2)
    assert [int(backwards[index][0][0, 0, 0]) for index in reversed(range(5))] == [9, 1, 3, 3, 1]
    with pytest.raises(DataError, match=r"d\.png.*number 2.*at most 1"):
        reds(ImagesDataset(root, max_bad_files=1))


def test_a_bad_file_is_counted_once(tmp_path: Path) -> None:
    root = write_directory(tmp_path, {**CATS_AND_DOGS, "cat/b.png": b""})
    data = ImagesDataset(root, max_bad_files=1)
    assert reds(data) == reds(data) == [1, 1, 3]


def test_a_class_with_nothing_readable_stops_whatever_the_limit(tmp_path: Path) -> None:
    data = ImagesDataset(write_directory(tmp_path, {"cat/a.png": b"", "dog/a.png": png()}), max_bad_files=9)
    with pytest.raises(DataError, match=r"cat; found no readable picture"):
        data[0]


def test_without_a_size_all_pictures_must_have_one(tmp_path: Path) -> None:
    data = ImagesDataset(write_directory(tmp_path, {**CATS_AND_DOGS, "dog/z.png": png(0, (9, 8))}), max_bad_files=9)
    with pytest.raises(DataError, match=r"z\.png; found 9×8 pixels; expected 8×8.*data\.size"):
        data[3]


def test_a_pipe_among_the_pictures_does_not_block(tmp_path: Path) -> None:
    root = write_directory(tmp_path, CATS_AND_DOGS)
    os.mkfifo(root / "cat" / "c.png")
    with pytest.raises(DataError, match="not a regular file"):
        ImagesDataset(root)[2]


# --- row 23: bombs, and hostile zips -----------------------------------------------------------------------------


def test_a_decompression_bomb_is_rejected_on_its_header(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    load = ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: decoded.append(self.size) or load(self))
    for width, height in ((50_000, 50_000), (9_000, 9_000)):  # Pillow itself refuses only the first
        with pytest.raises(BadPicture, match=r"pixels"):
            decode_picture(bomb(width, height), 1, None)
    assert decoded == []
    decode_picture(png(1), 1, None)
    assert decoded  # the probe works


def test_a_bomb_in_a_data_set_is_named(tmp_path: Path) -> None:
    data = ImagesDataset(write_directory(tmp_path, {**CATS_AND_DOGS, "dog/z.png": bomb(50_000, 50_000)}))
    with pytest.raises(DataError, match=r"z\.png"):
        data[3]


def test_a_strip_that_scaling_would_blow_up_is_rejected() -> None:
    with pytest.raises(BadPicture, match="too long a strip"):
        decode_picture(png(0, (1_000_000, 1), "L"), 1, 256)


@pytest.mark.parametrize("name", ["../evil.png", "/abs/evil.png", "cat/../../evil.png", "cat\\evil.png", "C:/x/a.png"])
def test_a_zip_with_paths_that_leave_it_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "data.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("cat/a.png", png())
        entry = zipfile.ZipInfo("x")
        entry.filename = name
        archive.writestr(entry, png())
    with pytest.raises(DataError, match="no plain relative path"):
        ImagesDataset(path)


def test_an_encrypted_zip_is_refused(tmp_path: Path) -> None:
    path = write_zip(tmp_path, CATS_AND_DOGS)
    raw = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        raw[raw.index(signature) + offset] |= 1
    path.write_bytes(raw)
    with pytest.raises(DataError, match="encrypted"):
        ImagesDataset(path)


def test_a_file_that_is_no_zip_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data.zip").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(DataError, match="not a readable zip"):
        ImagesDataset(tmp_path / "data.zip")


def test_a_zip_entry_that_unpacks_to_too_much_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "data.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("cat/a.png", bytes(2_000_000))
    assert path.stat().st_size < 10_000
    monkeypatch.setattr("acdit.data.sources.MAX_BYTES", 1_000_000)
    with pytest.raises(DataError, match=r"cat/a\.png.*unpacks to 2000000 bytes"):
        ImagesDataset(path)[0]


def test_a_zip_entry_with_a_wrong_checksum_is_a_bad_picture(tmp_path: Path) -> None:
    path = write_zip(tmp_path, CATS_AND_DOGS)
    raw = path.read_bytes()
    path.write_bytes(raw.replace(png(2), png(2)[:-20] + bytes(20), 1))
    with pytest.raises(DataError, match=r"cat/b\.png.*CRC"):
        ImagesDataset(path)[1]


def test_a_zip_is_read_by_forked_and_spawned_workers(tmp_path: Path) -> None:
    data = ImagesDataset(write_zip(tmp_path, {f"cat/{i:03d}.png": png(i) for i in range(100)}))
    assert reds(data) == list(range(100))
    loader = torch.utils.data.DataLoader(data, batch_size=10, num_workers=2)
    assert torch.cat([images[:, 0, 0, 0] for images, _ in loader]).tolist() == list(range(100))
    assert reds(pickle.loads(pickle.dumps(data))) == list(range(100))


@pytest.mark.parametrize("settings", [{"channels": 4}, {"size": 0}, {"size": [4, 0]}, {"size": [4]}])
def test_impossible_settings_are_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"data\.(channels|size)"):
        ImagesDataset(write_directory(tmp_path, CATS_AND_DOGS), **settings)
