"""Text files: which documents they hold, where they go on, what is held out, and what is wrong with bad ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from acdit.data import text_files as module
from acdit.data.bad_files import BadFiles
from acdit.data.documents import BuiltInText, Documents
from acdit.data.text_files import TextFiles, text_files
from acdit.errors import ConfigError, DataError

BAD = 99


def read(documents: Documents, limit: int = 0, place: Any = None, cut: Any = len) -> list[str]:
    """The documents, whole."""
    found, text = [], ""
    for piece in documents.pieces(cut, BadFiles(limit, what="text"), place):
        text += piece.text
        if piece.ends:
            found.append(text)
            text = ""
    assert not text
    return found


def write(folder: Path, **files: str | bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = folder / name.replace("__", ".").replace("_in_", "/")
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def test_a_file_is_one_document_or_a_document_a_line(tmp_path: Path) -> None:
    root = str(write(tmp_path, a__txt=b"\xef\xbb\xbfone\r\n\n  \ntwo \xe2\x80\xa8x\nthree") / "a.txt")
    assert read(TextFiles(root)) == ["one\r\n\n  \ntwo \u2028x\nthree"]
    assert read(TextFiles(root, document="line")) == ["one", "two \u2028x", "three"]


def test_a_folder_is_read_by_name(tmp_path: Path) -> None:
    write(tmp_path, b__txt="B", a__txt="A", sub_in_c__TXT="C", d__jsonl='{"text": "D"}\n\n{"text": ""}\n{"text": "E"}')
    write(tmp_path, x__md="no", hidden_in_y__txt="Y").joinpath("hidden").rename(tmp_path / ".hidden")
    assert read(TextFiles(str(tmp_path))) == ["A", "B", "D", "E", "C"]


def test_a_folder_may_have_splits(tmp_path: Path) -> None:
    root = str(write(tmp_path / "f", train__txt="T", valid__jsonl='{"t": "V"}', test_in_a__txt="S"))
    assert read(text_files(root, "train", "file", "t", 0, BadFiles(0))) == ["T"]
    assert read(text_files(root, "valid", "file", "t", 0, BadFiles(0))) == ["V"]
    assert read(text_files(root, "test", "file", "t", 0, BadFiles(0))) == ["S"]
    with pytest.raises(DataError, match=r"no other.txt, other.jsonl or folder other"):
        text_files(root, "other", "file", "t", 0, BadFiles(0))
    alone = str(write(tmp_path, a__txt="T") / "a.txt")
    for split in ("valid", "held_out"):
        with pytest.raises(ConfigError, match=r"without parts; expected train\. Fix: hold some out"):
            text_files(alone, split, "file", "t", 0, BadFiles(0))


@given(st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1), st.integers(1, 9))
def test_reading_goes_on_from_any_place(tmp_path_factory: pytest.TempPathFactory, text: str, size: int) -> None:
    folder = write(
        tmp_path_factory.mktemp("t"), a__txt=text, b__txt="ü" + text[::-1], c__jsonl=json.dumps({"text": text})
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_READ_AT_ONCE", size)
        for document in ("file", "line"):
            source = TextFiles(str(folder), document=document)
            pieces = list(source.pieces(len, BadFiles(BAD)))
            for number, piece in enumerate(pieces):
                rest = list(source.pieces(len, BadFiles(BAD), json.loads(json.dumps(piece.place))))
                ours = [(part.text, part.ends) for part in pieces[number + 1 :]]
                assert "".join(part for part, _ in ours) == "".join(part.text for part in rest)
                assert sum(ends for _, ends in ours) == sum(part.ends for part in rest)
        whole = read(TextFiles(str(folder)), BAD)
        assert whole[0] == text.removeprefix("\ufeff") or not text.strip("\ufeff").strip()


@given(st.lists(st.text("aé👍 ", min_size=1, max_size=5).filter(str.strip), min_size=2, max_size=9), st.data())
def test_the_held_out_part_and_the_rest_are_everything(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], data: st.DataObject
) -> None:
    folder = write(tmp_path_factory.mktemp("t"), a__txt="\n".join(lines[:2]), b__txt="\n \n".join(lines[2:]) + "\n")
    held_out = data.draw(st.one_of(st.integers(1, len(lines) - 1), st.floats(0.01, 0.7)))
    parts = [
        read(text_files(str(folder), part, "line", "text", held_out, BadFiles(BAD)), BAD)
        for part in ("train", "held_out")
    ]
    assert parts[0] + parts[1] == lines
    assert len(parts[1]) == (held_out if held_out >= 1 else max(1, round(held_out * len(lines))))


@given(st.text("aé👍\n", min_size=8), st.floats(0.1, 0.5))
def test_of_a_single_document_the_end_is_held_out(
    tmp_path_factory: pytest.TempPathFactory, text: str, share: float
) -> None:
    root = str(write(tmp_path_factory.mktemp("t"), a__txt="x" + text) / "a.txt")
    first, last = (
        read(text_files(root, part, "file", "text", share, BadFiles(0)))[0] for part in ("train", "held_out")
    )
    assert first + last == "x" + text
    assert -1e-6 <= len(last.encode()) - share * len(("x" + text).encode()) < 5


def test_the_smallest_share_holds_out_a_character(tmp_path: Path) -> None:
    root = str(write(tmp_path, a__txt="abcé") / "a.txt")
    assert read(text_files(root, "held_out", "file", "text", 1e-20, BadFiles(0))) == ["é"]


def test_what_cannot_be_held_out_is_refused(tmp_path: Path) -> None:
    root = str(write(tmp_path, a__txt="one\ntwo") / "a.txt")
    with pytest.raises(DataError, match=r"found 2 documents; expected more than the 2 of data\.held_out"):
        text_files(root, "train", "line", "text", 2, BadFiles(0))
    with pytest.raises(ConfigError, match=r"found 1\.5; expected a share below 1, or a whole number"):
        text_files(root, "train", "line", "text", 1.5, BadFiles(0))
    with pytest.raises(ConfigError, match=r"'valid', with data\.held_out=1; expected train, or held_out"):
        text_files(root, "valid", "line", "text", 1, BadFiles(0))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "an empty file"),
        (b"\xef\xbb\xbf", "an empty file"),
        (b"ab\ncd\xffe", r"no UTF-8: byte 0xff at byte 5 \(line 2\)"),
        (b"ab\ncd\xe2\x82", r"no UTF-8: byte 0xe2 at byte 5 \(line 2\)"),
        ("hi".encode("utf-16"), "as UTF-16 begins|a NUL byte at byte 3"),
        (b"\x7fELF\x02\x01\0\0", "a NUL byte at byte 6: no text"),
        (b"caf\xe9 au lait", "no UTF-8: byte 0xe9 at byte 3"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("size", [1, 3, 1 << 22])
def test_a_bad_file_is_named_with_the_place_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, reason: str, size: int
) -> None:
    monkeypatch.setattr(module, "_READ_AT_ONCE", size)
    root = write(tmp_path, a__txt=content, b__txt="good")
    with pytest.raises(DataError, match=rf"a\.txt; found a bad text \(.*({reason}).*data\.max_bad_files"):
        read(TextFiles(str(root)))
    assert read(TextFiles(str(root)), limit=1) == ["good"]  # nothing of the bad one


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", r"no JSON \("),
        (b"[1]", "no object, without the text field 'text'"),
        (b'{"body": "x", "id": 1}', "fields body, id, without the text field 'text'"),
        (b'{"text": null}', "nothing instead of text"),
        (b'{"text": 3}', "a value of type int instead of text"),
        (b'{"text": "\\ud800"}', "half a surrogate pair at character 0"),
        (b'{"text": "\xff"}', "no JSON"),
        (b"[" * 100_000, "no JSON"),
    ],
)  # fmt: skip
def test_a_bad_line_of_jsonl_is_named(tmp_path: Path, line: bytes, reason: str) -> None:
    root = str(write(tmp_path, a__jsonl=b'{"text": "one"}\n' + line + b'\n{"text": "two"}\n') / "a.jsonl")
    with pytest.raises(DataError, match=rf"a\.jsonl, line 2; found a bad text \({reason}"):
        read(TextFiles(root))
    assert read(TextFiles(root), limit=1) == ["one", "two"]


def test_a_bad_line_of_text_is_named_with_its_byte(tmp_path: Path) -> None:
    root = str(write(tmp_path, a__txt=b"one\nt\xfeo\nthr\0e\n") / "a.txt")
    bad = BadFiles(2)
    assert [piece.text for piece in TextFiles(root, document="line").pieces(len, bad)] == ["one"]
    assert list(bad.reasons.values()) == ["no UTF-8: byte 0xfe at byte 5", "a NUL byte at byte 11: no text"]
    assert [name.rpartition(", ")[2] for name in bad.reasons] == ["line 2", "line 3"]


@pytest.mark.parametrize(("root", "message"), [("nowhere", "found nothing"), ("", "no .txt or .jsonl file")])
def test_no_text_is_refused(tmp_path: Path, root: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        TextFiles(str(tmp_path / root))


def test_the_identity_follows_the_files(tmp_path: Path) -> None:
    root = write(tmp_path, a__txt="one", b__txt="two")
    first = TextFiles(str(root)).identity()
    assert TextFiles(str(root)).identity() == first
    assert TextFiles(str(root), document="line").identity() != first
    write(tmp_path, b__txt="three")
    assert TextFiles(str(root)).identity() != first


def test_the_built_in_text_has_two_parts() -> None:
    train, held_out = BuiltInText("train").text, BuiltInText("held_out").text
    assert train.startswith("First Citizen:\nBefore we proceed any further")
    assert train.endswith("\n\n")
    assert (len(train) + len(held_out), train.isascii()) == (298_983, True)
    assert 0.09 < len(held_out) / len(train + held_out) < 0.11
    with pytest.raises(ConfigError, match=r"'valid'; expected one of \('train', 'held_out'\)"):
        BuiltInText("valid")
