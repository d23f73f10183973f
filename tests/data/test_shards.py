"""Tar shards: what they hold, in which order, and what is refused (rows 20 to 23 of the reliability bar)."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import pytest
from PIL import ImageFile

from acdit.data import ShardsDataset
from acdit.data.classes import read_class_list
from acdit.data.tars import find_shards
from acdit.errors import DataError
from tests.data.pictures import bomb, png, sample, write_tar


def reds(data: ShardsDataset) -> list[int]:
    return [int(data[index][0][0, 0, 0]) for index in range(len(data))]


def test_pictures_and_labels_stand_in_the_order_of_shards_and_members(tmp_path: Path) -> None:
    write_tar(tmp_path / "s-0.tar", sample("b", 1, 2) | sample("a", 2, 0) | {"readme.md": b"x", "._b.png": b"mac"})
    write_tar(tmp_path / "s-1.tar", {"./deep/a.JPG": png(3), "./deep/a.cls": b"2\n"})
    data = ShardsDataset(str(tmp_path))
    assert reds(data) == [1, 2, 3]
    assert data.labels.tolist() == [2, 0, 2]
    assert [data[index][1] for index in range(3)] == [2, 0, 2]
    assert data.class_names == ["0", "1", "2"]
    assert data.shape == (3, 8, 8)
    assert reds(pickle.loads(pickle.dumps(data))) == [1, 2, 3]
    assert data.describe(2) == f"{tmp_path / 's-1.tar'}:deep/a.JPG"


def test_labels_may_be_names_in_text_or_json(tmp_path: Path) -> None:
    files = {"a.png": png(1), "a.json": json.dumps({"kind": "dog"}).encode(), "b.png": png(2), "b.txt": b"cat\n"}
    path = write_tar(tmp_path / "s.tar", files)
    data = ShardsDataset(str(path), label_field="kind")
    assert data.class_names == ["cat", "dog"]
    assert data.labels.tolist() == [1, 0]
    (tmp_path / "classes.txt").write_text("dog\ncat\n")
    listed = ShardsDataset(str(path), label_field="kind", classes=read_class_list(tmp_path / "classes.txt"))
    assert listed.class_names == ["dog", "cat"]
    assert listed.labels.tolist() == [0, 1]


def test_numbers_take_their_names_from_the_class_list(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", sample("a", 1, 1))
    (tmp_path / "index.json").write_text(
        json.dumps({"1": ["n02", "goldfish"], "0": ["n01", "tench"], "2": ["n3", "x"]})
    )
    data = ShardsDataset(str(path), classes=read_class_list(tmp_path / "index.json"))
    assert data.class_names == ["tench", "goldfish", "x"]
    write_tar(path, sample("a", 1, 3))
    with pytest.raises(DataError, match=r"label 3.*index\.json has 3 classes"):
        ShardsDataset(str(path), classes=read_class_list(tmp_path / "index.json"))


def test_patterns_name_shards_in_order(tmp_path: Path) -> None:
    for name in ("s-008", "s-009", "s-010", "t-a", "t-b"):
        write_tar(tmp_path / f"{name}.tar", sample("a", 1, 0))

    def found(pattern: str) -> list[str]:
        return [path.stem for path in find_shards(f"{tmp_path}/{pattern}", "train")]

    assert found("s-{008..010}.tar") == ["s-008", "s-009", "s-010"]
    assert found("{t-b,t-a,s-009}.tar") == ["t-b", "t-a", "s-009"]
    assert found("s-*.tar") == ["s-008", "s-009", "s-010"]
    assert found("{s-*,s-009}.tar") == ["s-008", "s-009", "s-010"]
    assert found("") == ["s-008", "s-009", "s-010", "t-a", "t-b"]
    with pytest.raises(DataError, match=r"no file .*s-011\.tar"):
        found("s-{010..012}.tar")
    with pytest.raises(DataError, match="expected fewer than"):
        found("s-{0..99999999}.tar")
    with pytest.raises(DataError, match="a directory without"):
        find_shards(str(tmp_path), "val")
    write_tar(tmp_path / "val" / "v.tar", sample("a", 1, 0))
    assert find_shards(str(tmp_path), "val") == [tmp_path / "val" / "v.tar"]


# --- what is refused, by name ------------------------------------------------------------------------------------

GOOD = sample("a", 1, 0) | sample("b", 2, 1)
WRONG = {
    "no label": ({**GOOD, "c.png": png()}, "s.tar:c; found no label beside picture"),
    "no picture": ({**GOOD, "c.cls": b"1"}, "s.tar:c; found no picture beside cls"),
    "two pictures": ({**GOOD, "a.jpg": png()}, r"a\.jpg; found a second picture"),
    "label not a number": ({**GOOD, "b.cls": b"cat"}, r"b\.cls.*expected a whole number"),
    "negative label": ({**GOOD, "b.cls": b"-1"}, "labels -1 … 0"),
    "absurd label": ({**GOOD, "b.cls": b"9" * 30}, "labels 0 … 9{30}"),
    "no JSON": ({"a.png": png(), "a.json": b"{"}, r"a\.json.*field 'label'"),
    "no such field": ({"a.png": png(), "a.json": b"{}"}, r"a\.json.*field 'label' \(data\.label_column\)"),
    "label of another type": ({"a.png": png(), "a.json": b'{"label": [1]}'}, r"label \[1\]"),
    "numbers and names": ({**GOOD, "c.png": png(), "c.txt": b"cat"}, "labels that are numbers and labels that are"),
    "nothing": ({"readme.md": b"x"}, "no pictures in its shards"),
    "path above": ({**GOOD, "../evil.png": png()}, r"'\.\./evil\.png', which is no plain relative path"),
    "absolute path": ({**GOOD, "/etc/evil.png": png()}, "no plain relative path"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_shard_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    files, named = WRONG[kind]
    with pytest.raises(DataError, match=named) as caught:
        ShardsDataset(str(write_tar(tmp_path / "s.tar", files)))
    assert "s.tar" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    entry = tarfile.TarInfo("a.png")
    entry.type, entry.linkname = kind, "/etc/passwd"
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        tar.addfile(entry)
    with pytest.raises(DataError, match=r"'a\.png', which is a link, device or sparse"):
        ShardsDataset(str(tmp_path / "s.tar"))


def headers(path: Path) -> list[int]:
    """Where the members' headers begin."""
    with tarfile.open(path) as tar:
        return [member.offset for member in tar.getmembers()]


def test_a_shard_cut_anywhere_is_refused(tmp_path: Path) -> None:
    """Also between two members, where tar readers see a shorter archive and nothing wrong."""
    path = write_tar(tmp_path / "s.tar", GOOD)
    whole = path.read_bytes()
    ends = headers(path)
    for cut in sorted({*range(0, ends[-1] + 1024, 100), *ends, ends[-1] + 1024}):
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"s\.tar"):
            ShardsDataset(str(path))


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", GOOD)
    content = bytearray(path.read_bytes())
    content[headers(path)[2]] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="a damaged header at 2048"):
        ShardsDataset(str(path))


@pytest.mark.parametrize("content", [b"no tar" * 200, b"\x1f\x8b" + bytes(600)])
def test_what_is_no_plain_tar_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "s.tar").write_bytes(content)
    with pytest.raises(DataError, match=r"no readable tar.*uncompressed \.tar"):
        ShardsDataset(str(tmp_path / "s.tar"))


def test_a_shard_that_changes_during_the_run_is_noticed(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", GOOD)
    data = ShardsDataset(str(path))
    assert reds(data) == [1, 2]
    write_tar(path, sample("c", 9, 0) | GOOD)
    with pytest.raises(DataError, match="another file than at the start"):
        data[0]


def test_a_corrupt_picture_is_named_and_counted(tmp_path: Path) -> None:
    files = sample("a", 1, 0) | sample("b", b"no picture", 0) | sample("c", 3, 0) | sample("d", 4, 1)
    path = str(write_tar(tmp_path / "s.tar", files))
    with pytest.raises(DataError, match=r"s\.tar:b\.png; found a bad picture.*at most 0"):
        reds(ShardsDataset(path))
    assert reds(ShardsDataset(path, max_bad_files=1)) == [1, 3, 3, 4]


def test_a_bomb_in_a_shard_is_rejected_on_its_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    load = ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: decoded.append(self.size) or load(self))
    data = ShardsDataset(str(write_tar(tmp_path / "s.tar", sample("a", bomb(50_000, 50_000), 0))), size=8)
    with pytest.raises(DataError, match=r"s\.tar:a\.png; found a bad picture .*pixels"):
        data[0]
    assert decoded == []


def test_a_picture_that_is_too_large_a_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tar(tmp_path / "s.tar", GOOD)
    monkeypatch.setattr("acdit.data.tars.MAX_BYTES", 10)
    monkeypatch.setattr(os, "pread", lambda *_: io.BytesIO().read())  # would be noticed: no picture
    with pytest.raises(DataError, match="bytes, more than 10"):
        ShardsDataset.__getitem__(_listed(path, monkeypatch), 0)


def _listed(path: Path, monkeypatch: pytest.MonkeyPatch) -> ShardsDataset:
    with monkeypatch.context() as patch:
        patch.setattr(ShardsDataset, "_label", lambda *_: 0)
        return ShardsDataset(str(path))
