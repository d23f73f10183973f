"""Tar shards in the layout of webdataset: 000123.jpg beside 000123.cls (or .json, or .txt).

Read by an index of byte ranges instead of the `webdataset` library. A run here draws each epoch's order as a keyed
permutation of all samples, so that a resumed run and another number of processes see the same samples: that needs
samples by number. webdataset streams: it shuffles shards and a buffer with generators of its own per worker, its order
depends on workers and processes, and it cannot go on inside an epoch. An uncompressed tar is a set of byte ranges at
known offsets, so listing its headers once gives everything; what is lost is sequential reading, which matters on
spinning disks and object stores (copy the shards to a local SSD). Every process lists the headers at its start, in
memory: nothing is written beside the data.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import numpy as np

from acdit.data.classes import ClassList, numbered
from acdit.data.labelled import LabelledPictures
from acdit.data.picture import SUFFIXES
from acdit.data.tars import Member, Shard, find_shards
from acdit.errors import DataError

LAYOUT = "a picture and its label beside each other: 000123.jpg, and 000123.cls (a number), .json or .txt (a class)"
_MAX_LABEL_BYTES = 2**20
_LABEL_KINDS = ("cls", "json", "txt")  # the first that a sample has counts


class ShardsDataset(LabelledPictures):
    """Pictures in tar shards.

    Classes are numbered as the labels say; class names are numbered in sorted order, or as a class list says.

    Args:
        root: see `find_shards`.
        split: the folder of a directory of shards.
        channels: 1 (luma) or 3 (RGB).
        size: edge in pixels after resize and crop, or (H, W); None: all pictures have the size of the first.
        max_bad_files: how many pictures may be bad.
        label_field: the field of a .json that holds the label: a number or a class name.
        classes: order and names of the classes.

    Raises:
        ConfigError: channels other than 1 or 3, a size below 1.
        DataError: no shards, a truncated or hostile one, a picture without label or a label without picture, labels of
            two kinds, classes that the list does not name.
    """

    def __init__(
        self,
        root: str,
        split: str = "train",
        channels: int = 3,
        size: int | Sequence[int] | None = None,
        max_bad_files: int = 0,
        label_field: str = "label",
        classes: ClassList | None = None,
    ) -> None:
        super().__init__(channels, size, max_bad_files)
        self._label_field = label_field
        self._shards = [Shard(path) for path in find_shards(root, split)]
        self._names: list[str] = []
        ranges: list[tuple[int, int, int]] = []
        labels: list[int | str] = []
        for number, shard in enumerate(self._shards):
            for picture, label in self._samples(shard):
                self._names.append(picture.name)
                ranges.append((number, picture.offset, picture.size))
                labels.append(label)
        if not labels:
            raise DataError(f"data.root {root}", found="no pictures in its shards", expected=LAYOUT)
        self._ranges = np.array(ranges, dtype=np.int64)
        self._set_labels(*_numbered_labels(labels, classes, f"data.root {root}"))

    def describe(self, index: int) -> str:
        """Shard and name of the picture."""
        return self._shards[self._ranges[index, 0]].describe(self._names[index])

    def listing(self) -> Iterator[tuple[str, int]]:
        """(shard's file name, picture's name, offset and size, class) of every index."""
        for name, (number, offset, size), label in zip(
            self._names, self._ranges.tolist(), self.labels.tolist(), strict=True
        ):
            yield f"{self._shards[number].path.name}\0{name}\0{offset}\0{size}", label

    def _read(self, index: int) -> bytes:
        shard, offset, size = map(int, self._ranges[index])
        return self._shards[shard].read(offset, size)

    def _samples(self, shard: Shard) -> list[tuple[Member, int | str]]:
        """Pictures of a shard with their labels, in the order of the tar."""
        samples: dict[str, dict[str, Member]] = {}
        for member in shard.members():
            folder, slash, file = member.name.rpartition("/")
            stem, _, kind = file.partition(".")
            if not stem:  # a dot file, as macOS adds
                continue
            parts = samples.setdefault(folder + slash + stem, {})
            kind = "picture" if f".{kind.lower()}" in SUFFIXES else kind.lower()
            if kind in parts:
                raise self._wrong(shard, member.name, f"a second {kind} of its sample", "one picture and one label")
            parts[kind] = member
        found = []
        for key, parts in samples.items():
            label_kind = next((kind for kind in _LABEL_KINDS if kind in parts), None)
            if label_kind is None or "picture" not in parts:
                if label_kind is None and "picture" not in parts:
                    continue  # neither: something else that lies in the shard
                found_instead = f"no {'label' if label_kind is None else 'picture'} beside {', '.join(sorted(parts))}"
                raise self._wrong(shard, key, found_instead, LAYOUT)
            found.append((parts["picture"], self._label(shard, parts[label_kind], label_kind)))
        return found

    def _label(self, shard: Shard, member: Member, kind: str) -> int | str:
        if member.size > _MAX_LABEL_BYTES:
            raise self._wrong(shard, member.name, f"{member.size:,} bytes", "a label")
        try:
            text = shard.read(member.offset, member.size).decode("utf-8").strip()
            value = json.loads(text)[self._label_field] if kind == "json" else int(text) if kind == "cls" else text
        except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
            if isinstance(error, DataError):
                raise
            field = f"with a field {self._label_field!r} (data.label_column)" if kind == "json" else ""
            expected = {"json": f"JSON {field}", "cls": "a whole number", "txt": "UTF-8 text"}[kind]
            raise self._wrong(shard, member.name, f"{type(error).__name__}: {error}", expected) from None
        if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
            raise self._wrong(shard, member.name, f"label {value!r}", "a number or a class name")
        return value

    def _wrong(self, shard: Shard, name: str, found: str, expected: str) -> DataError:
        return DataError(shard.describe(name), found=found, expected=expected, fix="make the shard anew")


def _numbered_labels(
    labels: list[int | str], classes: ClassList | None, where: str
) -> tuple[np.ndarray, Sequence[str]]:
    """Class indices and class names."""
    distinct = sorted(set(labels), key=str)
    if all(isinstance(label, str) for label in distinct):
        names = [str(label) for label in distinct]
        indices = {name: index for index, name in enumerate(names)}
        if classes is not None:
            indices, names = classes.indices(names, where, LAYOUT), list(classes.names)
        return np.array([indices[str(label)] for label in labels], dtype=np.int64), names
    numbers = [label for label in distinct if isinstance(label, int)]
    if len(numbers) < len(distinct):
        raise DataError(where, found="labels that are numbers and labels that are names", expected="one of the two")
    if min(numbers) < 0 or max(numbers) >= 2**31:
        raise DataError(where, found=f"labels {min(numbers)} … {max(numbers)}", expected="0 … number of classes − 1")
    return np.array(labels, dtype=np.int64), numbered(max(numbers) + 1, classes, where)
