"""Hugging Face `datasets`: local tables, their labels, and streams of them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import ImageFile

from acdit.data import HFDataset, PictureStream
from acdit.data.build import build_dataset
from acdit.data.classes import read_class_list
from acdit.errors import AcditError, ConfigError, DataError
from acdit.recipe import DataRecipe
from tests.data.pictures import bomb, png

datasets = pytest.importorskip("datasets", reason="the library `datasets` is in the extra train")
parquet_files = pytest.importorskip("pyarrow.parquet")


@pytest.fixture(autouse=True)
def _caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's caches in the test's own folder, and no network."""
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def table(pictures: list[Any], labels: list[Any], names: list[str] | None = None) -> Any:
    """Pictures by red value, as bytes, or as a whole cell."""
    kind = (
        datasets.ClassLabel(names=names) if names else datasets.Value("string" if labels[0] in ("a", "b") else "int64")
    )
    cells = [
        cell if isinstance(cell, dict) else {"bytes": png(cell) if isinstance(cell, int) else cell, "path": None}
        for cell in pictures
    ]
    features = datasets.Features({"image": datasets.Image(), "label": kind})
    return datasets.Dataset.from_dict({"image": cells, "label": labels}, features=features)


def parquet(folder: Path, made: Any, files: int = 1) -> str:
    folder.mkdir()
    for number in range(files):
        made.shard(files, number, contiguous=True).to_parquet(str(folder / f"{number}.parquet"))
    return str(folder)


def reds(data: HFDataset) -> list[int]:
    return [int(data[index][0][0, 0, 0]) for index in range(len(data))]


def streamed(data: PictureStream, count: int, start: int = 0, **options: Any) -> list[tuple[int, int]]:
    data.start(seed=options.get("seed", 1), history=0)
    found = data.samples([(position, None) for position in range(start, start + count)])
    return [(int(picture[0, 0, 0]), label) for picture, label in found]


PETS = ["cat", "dog"]


@pytest.mark.parametrize("form", ["parquet folder", "parquet file", "pattern", "saved", "saved splits", "pictures"])
def test_every_local_form_gives_pictures_and_named_classes(tmp_path: Path, form: str) -> None:
    made, root = table([1, 2, 3], [1, 0, 1], PETS), str(tmp_path / "data")
    if form == "saved":
        made.save_to_disk(root)
    elif form == "saved splits":
        datasets.DatasetDict({"train": made, "val": table([7], [0], PETS)}).save_to_disk(root)
        assert reds(HFDataset(root, split="val")) == [7]
    elif form == "pictures":
        for name, value in (("cat", 2), ("dog", 1), ("dog", 3)):
            (tmp_path / "data" / name).mkdir(parents=True, exist_ok=True)
            (tmp_path / "data" / name / f"{value}.png").write_bytes(png(value))
    else:
        root = parquet(tmp_path / "data", made, files=2)
        root = {"parquet file": f"{root}/0.parquet", "pattern": f"{root}/*.parquet"}.get(form, root)
    data = HFDataset(root)
    expected = {"parquet file": {(1, 1), (2, 0)}}.get(form, {(1, 1), (2, 0), (3, 1)})
    assert {(int(picture[0, 0, 0]), label) for picture, label in map(data.__getitem__, range(len(data)))} == expected
    assert data.class_names == PETS
    assert data.shape == (3, 8, 8)
    stream = PictureStream(root, size=8)
    assert stream.class_names == PETS
    assert set(streamed(stream, len(expected))) == expected


def test_labels_may_be_numbers_or_names(tmp_path: Path) -> None:
    numbers = HFDataset(parquet(tmp_path / "n", table([1, 2], [2, 0])))
    assert (numbers.class_names, numbers.labels.tolist()) == (["0", "1", "2"], [2, 0])
    names = HFDataset(parquet(tmp_path / "s", table([1, 2], ["b", "a"])))
    assert (names.class_names, names.labels.tolist()) == (["a", "b"], [1, 0])


def test_a_class_list_orders_and_names_the_classes(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("dog\ncat\n")
    classes = read_class_list(tmp_path / "classes.txt")
    root = parquet(tmp_path / "named", table([1, 2], [0, 1], PETS))
    data = HFDataset(root, classes=classes)
    assert (data.class_names, data.labels.tolist()) == (["dog", "cat"], [1, 0])
    assert sorted(streamed(PictureStream(root, size=8, classes=classes), 2)) == [(1, 1), (2, 0)]
    numbered = parquet(tmp_path / "numbered", table([1, 2], [0, 1]))
    assert HFDataset(numbered, classes=classes).class_names == ["dog", "cat"]
    with pytest.raises(DataError, match=r"1 missing \(cat\), 1 that the list does not name \(cow\)"):
        HFDataset(parquet(tmp_path / "other", table([1, 2], [0, 1], ["cow", "dog"])), classes=classes)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"image_column": "img"}, r"data\.image_column; found no column 'img' among image, label"),
        ({"label_column": "class"}, r"data\.label_column; found no column 'class'"),
        ({"image_column": "label", "label_column": "image"}, "expected pictures, or their bytes"),
        ({"label_column": "image"}, "found the same; expected two columns"),
        ({"split": "val"}, "split 'val'"),
        ({"root": "/nowhere/at/all"}, "nothing that can be read"),
        ({"root": "nobody/nothing"}, "ConnectionError|Offline"),
        ({"channels": 2}, r"data\.channels"),
    ],
)
@pytest.mark.parametrize("kind", [HFDataset, PictureStream])
def test_what_cannot_be_is_refused(tmp_path: Path, kind: Any, settings: dict[str, Any], named: str) -> None:
    root = parquet(tmp_path / "data", table([1, 2], [0, 1], PETS))
    with pytest.raises(AcditError, match=named) as caught:
        kind(**{"root": root, "size": 8, **settings})
    assert "\n" not in str(caught.value)


def test_a_label_without_a_class_is_named(tmp_path: Path) -> None:
    root = parquet(tmp_path / "data", table([1, 2], [0, -1], PETS))
    with pytest.raises(DataError, match=r"row 1; found label -1; expected one of 2 classes"):
        HFDataset(root)
    with pytest.raises(DataError, match=r"row 1; found label -1"):
        streamed(PictureStream(root, size=8), 2)


def test_a_stream_needs_a_size_and_known_classes(tmp_path: Path) -> None:
    root = parquet(tmp_path / "data", table([1], [0]))
    with pytest.raises(ConfigError, match=r"data\.size"):
        PictureStream(root)
    with pytest.raises(DataError, match=r"labels of type int64, in a stream.*set data\.classes"):
        PictureStream(root, size=8)


def test_a_path_in_a_table_does_not_open_other_files(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png(9))
    cells = [{"bytes": None, "path": str(tmp_path / "secret.png")}, {"bytes": None, "path": "http://localhost/a.png"}]
    (tmp_path / "data").mkdir()
    root = str(tmp_path / "data" / "0.parquet")
    parquet_files.write_table(table(cells, [0, 1], PETS).data.table, root)  # to_parquet puts the files' bytes in
    for index, found in ((0, "outside"), (1, "the address 'http")):
        with pytest.raises(DataError, match=rf"row {index}; found a bad picture.*{found}"):
            HFDataset(root, size=8)[index]


def test_bad_pictures_and_bombs_are_named_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    load = ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: decoded.append(self.size) or load(self))
    root = parquet(tmp_path / "data", table([bomb(50_000, 50_000), b"no picture", 3], [0, 0, 0], PETS))
    with pytest.raises(DataError, match=r"row 0; found a bad picture .*pixels"):
        HFDataset(root, size=8)[0]
    assert decoded == []
    assert reds(HFDataset(root, max_bad_files=2)) == [3, 3, 3]
    with pytest.raises(DataError, match=r"row \d; found a bad picture"):
        streamed(PictureStream(root, size=8), 3)
    stream = PictureStream(root, size=8, max_bad_files=2, shuffle_buffer=2)
    assert streamed(stream, 6) == [(3, 0)] * 6
    assert len(stream.bad_files) == 2
    nothing = parquet(tmp_path / "nothing", table([b"", b"?"], [0, 0], PETS))
    with pytest.raises(DataError, match="no readable picture in the whole stream"):
        streamed(PictureStream(nothing, size=8, max_bad_files=9), 1)


def test_a_damaged_table_is_one_message(tmp_path: Path) -> None:
    root = parquet(tmp_path / "data", table([1, 2], [0, 1], PETS))
    path = tmp_path / "data" / "0.parquet"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match=r"data\.root .*data") as caught:
        HFDataset(root)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("threads", [0, 3])
def test_a_stream_goes_on_where_it_was(tmp_path: Path, threads: int) -> None:
    """Over several files, in the middle of one, of a window and of the second epoch."""
    root = parquet(tmp_path / "data", table(list(range(20)), [0, 1] * 10, PETS), files=3)
    options: dict[str, Any] = {"size": 8, "shuffle_buffer": 4, "threads": threads}
    expected = streamed(PictureStream(root, **options), 60)
    assert sorted(expected[:20]) == sorted(expected[20:40]) == [(value, value % 2) for value in range(20)]
    assert expected[:20] != expected[20:40]
    for position in (6, 21, 33):
        first = PictureStream(root, **options)
        assert streamed(first, position) == expected[:position]
        second = PictureStream(root, **options)
        second.load_state(first.state(position))
        assert streamed(second, 60 - position, start=position) == expected[position:]


def test_crops_are_where_the_draws_say(tmp_path: Path) -> None:
    values = torch.arange(16 * 16, dtype=torch.uint8).reshape(16, 16).numpy()
    root = parquet(tmp_path / "data", table([png(values)], [0], PETS))
    place = (0.0, 0.0, 0.9)
    data, stream = HFDataset(root, channels=1, size=8), PictureStream(root, channels=1, size=8)
    stream.start(seed=0, history=0)
    assert data.cropped(0, place)[0].equal(stream.samples([(0, place)])[0][0])
    wide = HFDataset(parquet(tmp_path / "wide", table([png(values[:8])], [0], PETS)), channels=1, size=8)
    left, right = (wide.cropped(0, (0.0, 0.0, u))[0] for u in (0.0, 0.99))
    assert left.equal(torch.from_numpy(values[:8, :8])[None])
    assert right.equal(torch.from_numpy(values[:8, 8:])[None])


def test_the_recipe_builds_both_and_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = parquet(tmp_path / "data", table([1, 2], [0, 1], PETS))
    assert isinstance(build_dataset(DataRecipe(kind="hf", root=root)), HFDataset)
    assert isinstance(build_dataset(DataRecipe(kind="hf", root=root, streaming=True, size=8)), PictureStream)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"no library `datasets`.*acdit\[train\]"):
        build_dataset(DataRecipe(kind="hf", root=root))
