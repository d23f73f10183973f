"""UCF-101's lists of which clips belong to a split: trainlist01.txt, testlist01.txt, …

ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1     of a training list: path below the root, class counted from 1
ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi       of a test list
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from acdit.data.class_folders import ClassFiles
from acdit.data.classes import ClassList, read_class_list
from acdit.data.picture import MAX_BYTES
from acdit.data.sources import is_plain_path
from acdit.errors import DataError

CLASS_LIST = "classInd.txt"
"""Read where it lies beside a split file and no other list is given."""
_LINE = re.compile(r"(?P<path>\S.*?)(?:\s+(?P<number>\d+))?")


@dataclass(frozen=True)
class _Entry:
    path: str
    folder: str
    number: int | None
    where: str


def read_split_file(path: str | Path, suffixes: tuple[str, ...], classes: ClassList | None) -> ClassFiles:
    """The clips of a split, in the list's order.

    Args:
        path: the list.
        suffixes: how its paths may end.
        classes: order and names of the classes; None: of the `CLASS_LIST` beside the split file, else as the list
            itself numbers them. Classes without a clip in this list stay classes.

    Raises:
        DataError: no readable list, a path that leaves the root or is none of a clip, one that stands there twice, an
            unknown class, a number that contradicts the classes, or neither numbers nor classes.
    """
    path = Path(path)
    entries = _entries(path, suffixes)
    beside = path.parent / CLASS_LIST
    if classes is None and beside.is_file():
        classes = read_class_list(beside)
    if classes is None:
        names = _numbered_names(path, entries)
    else:
        names = list(classes.keys if {entry.folder for entry in entries} & set(classes.keys) else classes.names)
    indices = {name: index for index, name in enumerate(names)}
    for entry in entries:
        if entry.folder not in indices:
            assert classes is not None  # the list's own numbers name every folder
            raise DataError(
                entry.where, found=f"class {entry.folder!r}", expected=f"one of the {len(names)} of {classes.path}",
                fix="correct the list, or data.classes",
            )  # fmt: skip
        if entry.number is not None and entry.number != indices[entry.folder] + 1:
            raise DataError(
                entry.where, found=f"number {entry.number} for {entry.folder}",
                expected=f"{indices[entry.folder] + 1}, its place among the classes",
                fix=f"use the {CLASS_LIST} of this list",
            )  # fmt: skip
    labels = [indices[entry.folder] for entry in entries]
    return ClassFiles([entry.path for entry in entries], labels, names if classes is None else list(classes.names))


def _entries(path: Path, suffixes: tuple[str, ...]) -> list[_Entry]:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise _refused(str(path), f"{path.stat().st_size:,} bytes")
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise _refused(str(path), error.strerror or str(error)) from None
    except UnicodeDecodeError:
        raise _refused(str(path), "bytes that are not UTF-8") from None
    entries: list[_Entry] = []
    seen: set[str] = set()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        match = _LINE.fullmatch(line.strip())
        assert match is not None  # anything but blanks has a path
        name = match["path"]
        if not is_plain_path(name) or "/" not in name or not name.lower().endswith(suffixes):
            raise _refused(where, repr(line.strip()[:100]))
        if name in seen:
            raise DataError(f"data.split_file {where}", found=f"{name} for the second time", expected="once")
        seen.add(name)
        entries.append(_Entry(name, name.partition("/")[0], int(match["number"]) if match["number"] else None, where))
    if not entries:
        raise _refused(str(path), "no clips")
    return entries


def _numbered_names(path: Path, entries: list[_Entry]) -> list[str]:
    """Class names in the order of the list's own numbers."""
    by_number: dict[int, str] = {}
    for entry in entries:
        if entry.number is None:
            raise DataError(
                f"data.split_file {entry.where}", found=f"no class number, and no {CLASS_LIST} beside the list",
                expected="one of the two", fix=f"put UCF-101's {CLASS_LIST} beside it, or set data.classes to it",
            )  # fmt: skip
        if by_number.setdefault(entry.number, entry.folder) != entry.folder:
            raise DataError(
                f"data.split_file {entry.where}", found=f"number {entry.number} for {entry.folder}",
                expected=f"{by_number[entry.number]}, as before",
            )  # fmt: skip
    names = set(by_number.values())
    if sorted(by_number) != list(range(1, len(by_number) + 1)) or len(names) < len(by_number):
        raise DataError(
            f"data.split_file {path}", found=f"class numbers {sorted(by_number)[:10]} of {len(names)} classes",
            expected="1, 2, … without gaps", fix=f"put {CLASS_LIST} beside it, or set data.classes",
        )  # fmt: skip
    return [by_number[number] for number in sorted(by_number)]


def _refused(where: str, found: str) -> DataError:
    return DataError(
        f"data.split_file {where}", found=found,
        expected="lines like Class/clip.avi 1 (or without the number): a path below data.root",
    )  # fmt: skip
