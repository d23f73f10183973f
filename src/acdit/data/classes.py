"""A list of classes in a file: which there are, in which order, and how people call them."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from acdit.data.picture import MAX_BYTES
from acdit.errors import DataError

MAX_CLASSES = 2**20
"""Labels count classes: one wrong number must not make a list of a thousand million names."""
EXPECTED = (
    "a text file with one class a line (all numbered from 1, as UCF-101's classInd.txt, or none), or JSON: a list of "
    'names, {"0": name, …}, or {"0": [folder, name], …} as ImageNet\'s class index'
)


@dataclass(frozen=True)
class ClassList:
    """Classes in the order of their indices.

    Args:
        path: the file, for messages.
        names: how people call them; saved with the model.
        keys: how the data call them (ImageNet's folders n01440764 …); often the same.
    """

    path: Path
    names: tuple[str, ...]
    keys: tuple[str, ...]

    def indices(self, found: Collection[str], where: str, layout: str) -> dict[str, int]:
        """Index of every class that the data name, by key or by name.

        Args:
            found: the data's classes.
            where: the path that holds them, for messages.
            layout: what is expected there, for messages.

        Raises:
            DataError: classes are missing, there are others, or the list names one twice.
        """
        known = self.keys if set(found) & set(self.keys) else self.names
        if len(set(known)) < len(known):  # ImageNet has two classes "crane": fine as names, useless to look up
            twice = next(name for name in known if known.count(name) > 1)
            raise DataError(f"data.classes {self.path}", found=f"{twice!r} twice", expected="names that differ")
        missing, extra = sorted(set(known) - set(found)), sorted(set(found) - set(known))
        if missing or extra:
            parts = [f"{len(found)} classes"]
            parts += [f"{len(missing)} missing ({_some(missing)})"] if missing else []
            parts += [f"{len(extra)} that the list does not name ({_some(extra)})"] if extra else []
            raise DataError(
                where, found=", ".join(parts), expected=f"the {len(known)} classes of {self.path}: {layout}",
                fix="add or remove class folders, or correct data.classes",
            )  # fmt: skip
        return {key: index for index, key in enumerate(known)}

    def require_at_least(self, count: int, where: str) -> None:
        """Refuse data with a label beyond the list.

        Raises:
            DataError: the data have more than this list.
        """
        if count > len(self.names):
            raise DataError(
                where, found=f"label {count - 1}", expected=f"0 … {len(self.names) - 1}: {self.path} has "
                f"{len(self.names)} classes", fix="correct data.classes, or the labels",
            )  # fmt: skip


def read_class_list(path: str | Path) -> ClassList:
    """Read `data.classes`.

    Args:
        path: see `EXPECTED`; empty lines at the end of a text file do not count.

    Raises:
        DataError: no such file, not UTF-8, an empty name, or JSON of another form.
    """
    path = Path(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise _refused(path, f"{path.stat().st_size:,} bytes")
        text = path.read_text(encoding="utf-8-sig")
        pairs = _from_json(path, json.loads(text)) if path.suffix == ".json" else _from_lines(text)
    except OSError as error:
        raise _refused(path, error.strerror or str(error)) from None
    except UnicodeDecodeError:
        raise _refused(path, "bytes that are not UTF-8") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise _refused(path, f"no readable JSON ({error})") from None
    if not pairs:
        raise _refused(path, "no classes")
    for index, pair in enumerate(pairs):
        if not all(pair):
            raise _refused(path, f"class {index} is empty")
    return ClassList(path, tuple(name for _, name in pairs), tuple(key for key, _ in pairs))


def numbered(count: int, classes: ClassList | None, where: str) -> list[str]:
    """Names of `count` numbered classes: of the list, or their numbers.

    Raises:
        DataError: more classes than the list has, or more than `MAX_CLASSES`: a damaged label.
    """
    if classes is None:
        if count > MAX_CLASSES:
            raise DataError(
                where, found=f"label {count - 1}", expected=f"0 … {MAX_CLASSES - 1}", fix="correct the labels"
            )
        return [str(label) for label in range(count)]
    classes.require_at_least(count, where)
    return list(classes.names)


def _from_lines(text: str) -> list[tuple[str, str]]:
    names = [line.strip() for line in text.rstrip().splitlines()]
    numbered = [re.fullmatch(r"(\d+)\s+(\S.*)", name) for name in names]
    if all(match is not None and int(match[1]) == number for number, match in enumerate(numbered, start=1)):
        names = [match[2] for match in numbered if match is not None]
    return [(name, name) for name in names]


def _from_json(path: Path, value: object) -> list[tuple[str, str]]:
    if isinstance(value, dict):
        if set(value) != {str(index) for index in range(len(value))}:
            raise _refused(path, f"keys {_some(list(value))}", f"0 … {len(value) - 1}; {EXPECTED}")
        value = [value[str(index)] for index in range(len(value))]
    if not isinstance(value, list):
        raise _refused(path, f"a {type(value).__name__}")
    pairs = []
    for index, item in enumerate(value):
        pair = [item, item] if isinstance(item, str) else item
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise _refused(path, f"entry {index} is {str(item)[:60]!r}")
        pairs.append((pair[0], pair[1]))
    return pairs


def _refused(path: Path, found: str, expected: str = EXPECTED) -> DataError:
    return DataError(f"data.classes {path}", found=found, expected=expected)


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(str, names[:5])) + (", …" if len(names) > 5 else "")
