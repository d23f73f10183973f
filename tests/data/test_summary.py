"""`acdit data`: figures that are right, and the first bad file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from acdit.cli import main
from acdit.data import DigitsDataset, ImagesDataset
from acdit.data.summary import summarize
from tests.data.pictures import png


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, np.ndarray]:
    arrays = np.random.default_rng(0).integers(0, 256, (6, 8, 10, 3), dtype=np.uint8)
    for index, array in enumerate(arrays):
        folder = tmp_path / "data" / ("cat", "dog")[index > 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(folder / f"{index}.png")
    return tmp_path / "data", arrays / 255.0


def test_the_figures_are_those_of_the_pictures(folders: tuple[Path, np.ndarray]) -> None:
    root, values = folders
    found = summarize(ImagesDataset(root))
    assert (found.samples, found.shape, found.class_names, found.class_sizes) == (6, (3, 8, 10), ["cat", "dog"], (2, 4))
    assert found.mean == pytest.approx(values.mean((0, 1, 2)))
    assert found.std == pytest.approx(values.std((0, 1, 2)))
    assert (found.looked_at, found.stored, found.bad_files) == (6, ((8, 10), (8, 10)), {})
    few = summarize(ImagesDataset(root), at_most=2)
    assert few.mean == pytest.approx(values[[0, 5]].mean((0, 1, 2)))
    (root / "cat" / "x.png").write_bytes(png(1, (20, 30)))
    assert summarize(ImagesDataset(root, size=8)).stored == ((8, 10), (30, 20))


def test_data_in_memory_are_summed_up_too() -> None:
    data = DigitsDataset()
    found = summarize(data, at_most=None)
    assert found.looked_at == found.samples == 1297
    assert found.mean == pytest.approx([float(data.images.double().mean() / 255)])


def test_the_command_prints_them(folders: tuple[Path, np.ndarray], capsys: pytest.CaptureFixture[str]) -> None:
    settings = [
        "data.kind=images",
        f"data.root={folders[0]}",
        "data.channels=3",
        "model.num_classes=2",
        "data.size=[8,8]",
    ]
    assert main(["data", "digits", *settings]) == 0
    printed = capsys.readouterr().out
    for line in (
        "samples          6",
        "classes          2: cat, dog",
        "sample           3 × 8 × 8",
        "bad files        0",
    ):
        assert line in printed
    assert main(["data", "digits", *settings, "model.num_classes=3"]) == 3
    assert "found 3, and 2 classes in the data" in capsys.readouterr().err


def test_the_first_bad_file_ends_it_with_exit_code_3(
    folders: tuple[Path, np.ndarray], capsys: pytest.CaptureFixture[str]
) -> None:
    root, _ = folders
    for name in ("1.png", "2.png"):
        (root / "cat" / name).write_bytes(b"no picture")
    settings = ["data.kind=images", f"data.root={root}", "data.channels=3", "model.num_classes=2"]
    assert main(["data", "digits", *settings]) == 3
    captured = capsys.readouterr()
    assert "bad files        2" in captured.out
    assert "cat/1.png; found a bad picture" in captured.err
    assert "the first of 2" in captured.err
    assert main(["data", "digits", *settings, "data.max_bad_files=2"]) == 0
