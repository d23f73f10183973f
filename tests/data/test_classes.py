"""Class lists: their forms, and what does not fit the data (rows 20 and 21)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from acdit.data import ImagesDataset
from acdit.data.build import build_dataset
from acdit.data.classes import read_class_list
from acdit.errors import DataError
from acdit.recipe import DataRecipe


def folders(root: Path, *names: str) -> Path:
    for value, name in enumerate(names):
        (root / name).mkdir(parents=True)
        Image.new("RGB", (4, 4), (value, 0, 0)).save(root / name / "a.png")
    return root


def listed(tmp_path: Path, content: str, name: str = "classes.txt") -> Path:
    (tmp_path / name).write_text(content, encoding="utf-8")
    return tmp_path / name


def test_a_list_gives_the_order(tmp_path: Path) -> None:
    root = folders(tmp_path / "data", "cat", "dog", "eel")
    recipe = DataRecipe(kind="images", root=str(root), classes=str(listed(tmp_path, "eel\ncat\r\ndog\n\n")))
    data = build_dataset(recipe)
    assert data.class_names == ["eel", "cat", "dog"]
    assert [(int(data[i][0][0, 0, 0]), data[i][1]) for i in range(3)] == [(2, 0), (0, 1), (1, 2)]


def test_imagenets_index_gives_readable_names_to_folders(tmp_path: Path) -> None:
    root = folders(tmp_path / "data", "n02", "n01")
    index = listed(tmp_path, json.dumps({"0": ["n01", "tench"], "1": ["n02", "goldfish"]}), "index.json")
    data = ImagesDataset(root, classes=read_class_list(index))
    assert data.class_names == ["tench", "goldfish"]
    assert [int(data[i][0][0, 0, 0]) for i in range(2)] == [1, 0]
    named = ImagesDataset(folders(tmp_path / "named", "goldfish", "tench"), classes=read_class_list(index))
    assert named.class_names == ["tench", "goldfish"]
    assert [int(named[i][0][0, 0, 0]) for i in range(2)] == [1, 0]


def test_missing_and_extra_folders_are_named_in_one_message(tmp_path: Path) -> None:
    root = folders(tmp_path / "data", "cat", "dog")
    path = listed(tmp_path, "cat\neel\nfox\n")
    with pytest.raises(DataError) as caught:
        ImagesDataset(root, classes=read_class_list(path))
    message = str(caught.value)
    for part in (
        str(root),
        "2 classes, 2 missing (eel, fox), 1 that the list does not name (dog)",
        str(path),
        "<root>",
    ):
        assert part in message
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("classes.txt", "", "no classes"),
        ("classes.txt", "cat\n\ndog", "class 1 is empty"),
        ("classes.json", "[1]", "entry 0 is '1'"),
        ("classes.json", '{"0": "cat", "2": "dog"}', "keys 0, 2; expected 0 … 1"),
        ("classes.json", '"cat"', "a str"),
        ("classes.json", "{", "no readable JSON"),
        ("classes.json", "[" * 100_000, "no readable JSON"),
    ],
)
def test_a_wrong_list_is_refused(tmp_path: Path, name: str, content: str, named: str) -> None:
    with pytest.raises(DataError, match=named) as caught:
        read_class_list(listed(tmp_path, content, name))
    assert name in str(caught.value)


def test_a_list_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        read_class_list(tmp_path / "classes.txt")
    (tmp_path / "classes.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(DataError, match="not UTF-8"):
        read_class_list(tmp_path / "classes.txt")


def test_a_name_may_repeat_only_where_it_is_not_looked_up(tmp_path: Path) -> None:
    """ImageNet has two classes called crane."""
    index = listed(tmp_path, json.dumps([["n1", "crane"], ["n2", "crane"]]), "index.json")
    data = ImagesDataset(folders(tmp_path / "data", "n1", "n2"), classes=read_class_list(index))
    assert data.class_names == ["crane", "crane"]
    with pytest.raises(DataError, match="'crane' twice"):
        ImagesDataset(folders(tmp_path / "named", "crane"), classes=read_class_list(index))
