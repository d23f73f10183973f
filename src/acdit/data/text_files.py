"""Text files: plain UTF-8, a document a file or a line, and JSONL."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from acdit.data.bad_files import BadFiles
from acdit.data.documents import Cut, Documents, Piece
from acdit.data.sources import DirectorySource, is_hidden
from acdit.errors import ConfigError, DataError, first_line

TEXT, JSONL = (".txt",), (".jsonl", ".ndjson")
_READ_AT_ONCE = 1 << 22  # bytes
_BOM = codecs.BOM_UTF8


class TextFiles(Documents):
    """The documents of a file, or of all .txt and .jsonl files of a folder, by name.

    Places are (file, byte, line).

    Args:
        root: a file (.jsonl: an object a line; anything else: text), or a folder.
        split: of a folder with train.txt, valid.txt, … (or .jsonl, or folders train/, …) the one to read; a folder
            without them is "train" as a whole.
        document: "file" (each text file is one document) or "line" (each line that is not blank).
        column: what holds the text in JSONL.

    Raises:
        DataError: nothing there, or no such split.
    """

    def __init__(self, root: str, split: str = "train", document: str = "file", column: str = "text") -> None:
        self.where = f"data.root {root}"
        self._files = _listed(Path(root), split)
        self._document, self._column = document, column
        self._start: Sequence[int] = (0, 0, 0)
        self._stop: Sequence[int] = (len(self._files), 0, 0)
        self._checked: dict[int, str | None] = {}

    def identity(self) -> dict[str, Any]:
        files = []
        for name, path in self._files:
            try:
                status = path.stat()
            except OSError as error:
                raise DataError(str(path), found=error.strerror or str(error), expected="a readable file") from None
            files.append([name, status.st_size, status.st_mtime_ns])
        return {
            "kind": "files", "files": files, "document": self._document, "column": self._column,
            "start": list(self._start), "stop": list(self._stop),
        }  # fmt: skip

    def between(self, start: Sequence[int] | None, stop: Sequence[int] | None) -> TextFiles:
        made = object.__new__(TextFiles)
        made.__dict__.update(self.__dict__)
        made._start, made._stop = start or self._start, stop or self._stop
        return made

    def pieces(self, cut: Cut, bad: BadFiles, place: Sequence[int] | None = None) -> Iterator[Piece]:
        number, byte, line = place or self._start
        while (number, byte) < tuple(self._stop[:2]):
            path = self._files[number][1]
            stop = self._stop[1] if number == self._stop[0] else None
            try:
                if path.suffix.lower() in JSONL or self._document == "line":
                    yield from self._lines(number, byte, line, stop, bad)
                elif (reason := self._reason(number)) is None:
                    yield from self._whole(number, byte, stop, cut)
                else:
                    bad.add(str(path), reason)
            except OSError as error:
                bad.add(str(path), error.strerror or str(error))
            number, byte, line = number + 1, 0, 0

    def _whole(self, number: int, start: int, stop: int | None, cut: Cut) -> Iterator[Piece]:
        decoder = codecs.getincrementaldecoder("utf-8")()
        with self._files[number][1].open("rb") as file:
            if start == 0 and file.read(len(_BOM)) == _BOM:
                start = len(_BOM)
            file.seek(start)
            at, read, rest = start, start, ""
            while data := file.read(_READ_AT_ONCE if stop is None else min(_READ_AT_ONCE, stop - read)):
                read += len(data)
                rest += decoder.decode(data)
                place = cut(rest)
                if place:
                    at += len(rest[:place].encode())
                    yield Piece(rest[:place], False, (number, at, 0))
                    rest = rest[place:]
        behind = (number + 1, 0, 0) if stop is None else (number, stop, 0)
        yield Piece(rest + decoder.decode(b"", final=True), True, behind)

    def _lines(self, number: int, start: int, line: int, stop: int | None, bad: BadFiles) -> Iterator[Piece]:
        name, path = str(self._files[number][1]), self._files[number][1]
        objects = path.suffix.lower() in JSONL
        if start == 0 and path.stat().st_size == 0:
            bad.add(name, "an empty file")
        with path.open("rb") as file:
            file.seek(start)
            at = start
            for raw in file:
                if stop is not None and at >= stop:
                    return
                first, at, line = at, at + len(raw), line + 1
                raw = raw.removeprefix(_BOM) if first == 0 else raw
                if not raw.strip():
                    continue
                try:
                    text = self._object(raw) if objects else _decoded(raw, first).rstrip("\r\n")
                except ValueError as error:
                    bad.add(f"{name}, line {line}", str(error))
                    continue
                if text.strip():
                    yield Piece(text, True, (number, at, line))

    def _object(self, raw: bytes) -> str:
        """The text of a line of JSONL; raises `ValueError` with what is wrong."""
        try:
            row = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"no JSON ({first_line(error)})") from None
        if not isinstance(row, dict) or self._column not in row:
            found = f"fields {', '.join(map(str, list(row)[:8]))}" if isinstance(row, dict) else "no object"
            raise ValueError(f"{found}, without the text field {self._column!r} (data.text_column)")
        return plain(row[self._column])

    def _reason(self, number: int) -> str | None:
        """What is wrong with a file that is a document as a whole: looked at before any of it is used."""
        if number not in self._checked:
            self._checked[number] = _fault(self._files[number][1])
        return self._checked[number]

    def _inside(self, held_out: float) -> Sequence[int]:
        number = next(number for number in range(len(self._files)) if self._checked.get(number, "") is None)
        path = self._files[number][1]
        size = path.stat().st_size
        byte = min(int(size * (1 - held_out)), size - 1)
        with path.open("rb") as file:
            while byte > 0:
                file.seek(byte)
                if file.read(1)[0] & 0xC0 != 0x80:  # not inside a character
                    break
                byte -= 1
        if byte <= 0:
            self._require_rest(0, held_out)
        return (number, byte, 0)


def plain(value: Any) -> str:
    """A text that UTF-8 can hold; raises `ValueError` with what is wrong."""
    if not isinstance(value, str):
        raise ValueError(f"{'nothing' if value is None else f'a value of type {type(value).__name__}'} instead of text")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"half a surrogate pair at character {error.start}") from None
    return value


def _decoded(raw: bytes, start: int) -> str:
    if (place := raw.find(b"\0")) >= 0:
        raise ValueError(f"a NUL byte at byte {start + place}: no text")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ValueError(_not_utf8(raw[error.start], start + error.start)) from None


def _not_utf8(byte: int, place: int) -> str:
    return f"no UTF-8: byte 0x{byte:02x} at byte {place}"


def _fault(path: Path) -> str | None:
    """What is wrong with a text file; None: nothing. Reads it."""
    if not path.is_file():  # a pipe would block for ever
        return "not a regular file"
    decoder = codecs.getincrementaldecoder("utf-8")()
    at, line, kept = 0, 1, 0
    with path.open("rb") as file:
        while True:
            data = file.read(_READ_AT_ONCE)
            if (place := data.find(b"\0")) >= 0:
                return f"a NUL byte at byte {at + place}: no text"
            held = len(decoder.getstate()[0])
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                line += error.object[: error.start].count(b"\n")
                wrong = _not_utf8(error.object[error.start], at - held + error.start)
                return f"{wrong} (line {line})" + (", as UTF-16 begins" if wrong.endswith(" 0") and at == 0 else "")
            if not data:
                return None if kept else "an empty file"
            at, line, kept = at + len(data), line + data.count(b"\n"), kept + bool(text.strip("\ufeff"))


def _listed(root: Path, split: str) -> list[tuple[str, Path]]:
    """(name, path) of every file, in order."""
    where = f"data.root {root}"
    if root.is_file():
        return [(root.name, root)]
    if not root.is_dir():
        raise DataError(where, found="nothing", expected="a text file, or a folder of .txt or .jsonl files")
    suffixes = TEXT + JSONL
    own = [root / f"{split}{suffix}" for suffix in suffixes if (root / f"{split}{suffix}").is_file()]
    if own:
        return [(path.name, path) for path in own]
    folder = root / split if (root / split).is_dir() else root
    if folder == root and split not in ("train", "held_out"):
        raise DataError(where, found=f"no {split}.txt, {split}.jsonl or folder {split}", expected="data.split's files")
    names = sorted(
        name for name in DirectorySource(folder).files if name.lower().endswith(suffixes) and not is_hidden(name)
    )
    if not names:
        raise DataError(str(folder), found="no .txt or .jsonl file", expected="at least one", fix="check data.root")
    return [(name, folder / name) for name in names]


def text_files(
    root: str, split: str, document: str, column: str, held_out: float, bad: BadFiles
) -> Documents:  # fmt: skip
    """The documents of a split; where `held_out` is not 0, of the part of "train" that it divides off.

    Raises:
        ConfigError, DataError: see `TextFiles` and `Documents.divided`.
    """
    if held_out:
        return TextFiles(root, "train", document, column).divided(held_out, split, bad)
    if split == "held_out" or (split != "train" and Path(root).is_file()):
        found = TextFiles(root, split, document, column) if (Path(root) / split).exists() else None
        if found is None:
            raise ConfigError(
                "data.split", found=f"{split!r}, of data.root {root} without parts", expected="train",
                fix="hold some out: data.held_out=0.1 data.split=held_out",
            )  # fmt: skip
        return found
    return TextFiles(root, split, document, column)
