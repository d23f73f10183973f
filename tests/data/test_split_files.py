"""UCF-101's lists."""

from __future__ import annotations

from pathlib import Path

import pytest

from acdit.data.classes import read_class_list
from acdit.data.split_files import read_split_file
from acdit.errors import DataError

SUFFIXES = (".avi",)
TRAIN = "Typing/v_Typing_g08_c01.avi 3\nArchery/v_Archery_g08_c02.avi 1\nArchery/a b.avi 1\nDrumming/a.avi 2\n"
TEST = "Drumming/v_Drumming_g01_c01.avi\r\nTyping/v_Typing_g01_c01.avi\r\n"
CLASSES = "1 Archery\n2 Drumming\n3 Typing\n"


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / f"{name}.txt").write_bytes(text.encode())
    return folder


def test_a_training_list_and_a_test_list_number_the_classes_alike(tmp_path: Path) -> None:
    write(tmp_path, trainlist01=TRAIN, testlist01=TEST, classInd=CLASSES)
    train = read_split_file(tmp_path / "trainlist01.txt", SUFFIXES, None)
    assert train.class_names == ["Archery", "Drumming", "Typing"]
    assert train.files[1] == "Archery/v_Archery_g08_c02.avi"  # the list's own order
    assert train.labels == [2, 0, 0, 1]
    test = read_split_file(tmp_path / "testlist01.txt", SUFFIXES, None)
    assert (test.class_names, test.labels) == (train.class_names, [1, 2])


def test_a_training_list_alone_numbers_its_classes(tmp_path: Path) -> None:
    found = read_split_file(write(tmp_path, a=TRAIN) / "a.txt", SUFFIXES, None)
    assert (found.class_names, found.labels) == (["Archery", "Drumming", "Typing"], [2, 0, 0, 1])


def test_a_class_list_is_read_with_and_without_numbers(tmp_path: Path) -> None:
    write(tmp_path, numbered=CLASSES, plain="Archery\nDrumming\nTyping\n", odd="1 Archery\n3 Typing\n")
    assert read_class_list(tmp_path / "numbered.txt").names == ("Archery", "Drumming", "Typing")
    assert read_class_list(tmp_path / "plain.txt").names == ("Archery", "Drumming", "Typing")
    assert read_class_list(tmp_path / "odd.txt").names == ("1 Archery", "3 Typing")
    others = read_class_list(write(tmp_path, b="Typing\nDrumming\nArchery\nYoYo") / "b.txt")
    found = read_split_file(write(tmp_path, c=TEST) / "c.txt", SUFFIXES, others)
    assert (found.class_names, found.labels) == (["Typing", "Drumming", "Archery", "YoYo"], [1, 0])


@pytest.mark.parametrize(
    ("lines", "classes", "named"),
    [
        ("Archery/../../etc/a.avi 1", None, r"line 1; found 'Archery/\.\./"),
        ("/Archery/a.avi 1", None, "line 1"),
        ("a.avi 1", None, r"line 1; found 'a\.avi 1'; expected lines like"),
        ("Archery/a.txt 1", None, "line 1"),
        ("Archery/a.avi 1\n\nArchery/a.avi 1", None, r"line 3; found Archery/a\.avi for the second time"),
        ("Archery/a.avi 1\nTyping/a.avi", None, r"line 2; found no class number, and no classInd\.txt beside"),
        ("Archery/a.avi 1\nTyping/a.avi 1", None, "line 2; found number 1 for Typing; expected Archery, as before"),
        ("Archery/a.avi 1\nArchery/b.avi 2", None, r"class numbers \[1, 2\] of 1 classes"),
        ("Archery/a.avi 1\nTyping/a.avi 3", None, r"class numbers \[1, 3\]"),
        ("Archery/a.avi 1\nTyping/a.avi 2", CLASSES, "line 2; found number 2 for Typing; expected 3"),
        ("YoYo/a.avi", CLASSES, "line 1; found class 'YoYo'; expected one of the 3"),
        ("", None, "found no clips"),
    ],
)
def test_a_wrong_list_is_refused_by_its_line(tmp_path: Path, lines: str, classes: str | None, named: str) -> None:
    write(tmp_path, a=lines, **({} if classes is None else {"classInd": classes}))
    with pytest.raises(DataError, match=named):
        read_split_file(tmp_path / "a.txt", SUFFIXES, None)


def test_a_class_list_that_is_given_goes_before_the_one_beside(tmp_path: Path) -> None:
    write(tmp_path, a=TEST, classInd=CLASSES, mine="Typing\nDrumming\nArchery\n")
    found = read_split_file(tmp_path / "a.txt", SUFFIXES, read_class_list(tmp_path / "mine.txt"))
    assert (found.class_names, found.labels) == (["Typing", "Drumming", "Archery"], [1, 0])


@pytest.mark.parametrize("folders", [("n01", "n02"), ("cat", "dog")])
def test_folders_may_be_called_by_a_class_lists_keys_or_names(tmp_path: Path, folders: tuple[str, str]) -> None:
    (tmp_path / "classes.json").write_text('{"0": ["n02", "dog"], "1": ["n01", "cat"]}')
    write(tmp_path, a="".join(f"{folder}/a.avi\n" for folder in folders))
    found = read_split_file(tmp_path / "a.txt", SUFFIXES, read_class_list(tmp_path / "classes.json"))
    assert (found.class_names, found.labels) == (["dog", "cat"], [1, 0])


def test_marks_and_large_letters_of_other_systems(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfArchery/A.AVI 1\r\n")
    assert read_split_file(tmp_path / "a.txt", SUFFIXES, None).files == ["Archery/A.AVI"]


def test_a_huge_list_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("acdit.data.split_files.MAX_BYTES", 10)
    with pytest.raises(DataError, match=r"found \d+ bytes"):
        read_split_file(write(tmp_path, a=TRAIN) / "a.txt", SUFFIXES, None)


def test_no_list_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.split_file .*none\.txt; found No such file"):
        read_split_file(tmp_path / "none.txt", SUFFIXES, None)
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe/a.avi 1")
    with pytest.raises(DataError, match="UTF-8"):
        read_split_file(tmp_path / "a.txt", SUFFIXES, None)
