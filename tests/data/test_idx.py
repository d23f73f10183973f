from __future__ import annotations

import gzip
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from acdit.data import IdxDataset
from acdit.errors import ConfigError, DataError

IMAGES = np.random.default_rng(0).integers(0, 255, (6, 5, 4), dtype=np.uint8)
LABELS = np.array([0, 3, 1, 2, 3, 0], dtype=np.uint8)


def idx(array: np.ndarray, kind: int = 0x08) -> bytes:
    return bytes([0, 0, kind, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write(root: Path, images: bytes, labels: bytes, prefix: str = "train", packed: bool = False) -> Path:
    for name, data in ((f"{prefix}-images-idx3-ubyte", images), (f"{prefix}-labels-idx1-ubyte", labels)):
        (root / (name + ".gz" * packed)).write_bytes(gzip.compress(data) if packed else data)
    return root


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("split", "prefix"), [("train", "train"), ("test", "t10k")])
def test_pictures_and_labels_come_back(tmp_path: Path, packed: bool, split: str, prefix: str) -> None:
    data = IdxDataset(write(tmp_path, idx(IMAGES), idx(LABELS), prefix, packed), split)
    assert len(data) == 6
    assert data.shape == (1, 5, 4)
    assert data.num_classes == 4
    assert data.class_names == ["0", "1", "2", "3"]
    for index in range(6):
        image, label = data[index]
        assert image.dtype == torch.uint8
        assert np.array_equal(image[0].numpy(), IMAGES[index])
        assert label == LABELS[index]


def test_size_and_channels(tmp_path: Path) -> None:
    data = IdxDataset(write(tmp_path, idx(IMAGES), idx(LABELS)), channels=3, size=8)
    image, _ = data[2]
    assert image.shape == data.shape == (3, 8, 8)
    assert torch.equal(image[0], image[2])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("images", "named"),
    [
        (b"\x89PNG" + bytes(50), "first bytes 89 50 4e 47"),
        (idx(IMAGES, kind=0x0D), "first bytes 00 00 0d 03"),
        (idx(IMAGES[0]), "first bytes 00 00 08 02"),
        (idx(IMAGES)[:9], "truncated header"),
        (idx(IMAGES)[:-1], "119 bytes of data|declares"),
        (idx(IMAGES) + b"x", "bytes to spare"),
        (bytes([0, 0, 8, 3]) + struct.pack(">3I", 0, 28, 28), "declares"),
        (b"", "first bytes"),
    ],
)
def test_malformed_pictures_are_refused_by_name(tmp_path: Path, images: bytes, named: str, packed: bool) -> None:
    with pytest.raises(DataError, match=named) as caught:
        IdxDataset(write(tmp_path, images, idx(LABELS), packed=packed))
    assert "train-images-idx3-ubyte" in str(caught.value)
    assert caught.value.exit_code == 3


def test_a_header_that_promises_terabytes_allocates_nothing(tmp_path: Path) -> None:
    promise = bytes([0, 0, 8, 3]) + struct.pack(">3I", 2**31, 2**20, 2**10) + bytes(100)
    write(tmp_path, promise, idx(LABELS), packed=True)
    tracemalloc.start()
    with pytest.raises(DataError, match="declares"):
        IdxDataset(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


def test_a_broken_gzip_is_refused(tmp_path: Path) -> None:
    write(tmp_path, idx(IMAGES), idx(LABELS), packed=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(DataError, match="unreadable data"):
        IdxDataset(tmp_path)
    path.write_bytes(b"not gzip at all")
    with pytest.raises(DataError, match="unreadable data"):
        IdxDataset(tmp_path)


def test_counts_must_agree(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="5 labels; expected 6"):
        IdxDataset(write(tmp_path, idx(IMAGES), idx(LABELS[:5])))


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="neither train-images-idx3-ubyte nor"):
        IdxDataset(tmp_path)
    with pytest.raises(DataError, match="no such directory"):
        IdxDataset(tmp_path / "nowhere")


@pytest.mark.parametrize("settings", [{"split": "val"}, {"channels": 2}, {"size": -1}])
def test_impossible_settings_are_refused(tmp_path: Path, settings: dict[str, object]) -> None:
    write(tmp_path, idx(IMAGES), idx(LABELS))
    with pytest.raises(ConfigError):
        IdxDataset(tmp_path, **settings)
