"""Hugging Face `datasets`: picture folders, parquet and arrow files, saved data sets, and names on the hub.

Imported when used: the library is in the extra `train`. Pictures are handed over undecoded, so that the same limits
hold here as everywhere (see `decode_picture`).
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np

from acdit.data.classes import ClassList, numbered
from acdit.data.labelled import LabelledPictures
from acdit.data.picture import MAX_BYTES, BadPicture
from acdit.errors import AcditError, ConfigError, DataError, first_line

EXPECTED = (
    "a folder of class folders, of .parquet files or written by save_to_disk; a .parquet or .arrow file or a pattern "
    "of them; or the name of a data set on the hub"
)
_LISTED_AT_ONCE = 1000  # rows


def load_table(root: str, split: str, streaming: bool, subset: str | None = None) -> Any:
    """What `data.root` names, as `datasets` has it.

    Args:
        root: see `EXPECTED`.
        split: of the data set; files named one by one are all of whatever split is asked for.
        streaming: a data set to go through (`IterableDataset`) instead of one with rows by number.
        subset: which configuration of a data set on the hub.

    Raises:
        ConfigError: the library is not installed.
        DataError: nothing there, no such split, or what the library refuses.
    """
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            "data.kind=hf", found=f"no library `datasets` ({error})", expected="the extra `train`",
            fix="pip install 'acdit[train]'",
        ) from None  # fmt: skip
    place = Path(root)
    where = f"data.root {root}, split {split!r}"
    files = sorted(glob(root)) if root.endswith((".parquet", ".arrow")) else []
    try:
        if (place / "dataset_dict.json").is_file() or (place / "state.json").is_file():
            saved = datasets.load_from_disk(root)
            if isinstance(saved, datasets.DatasetDict):
                if split not in saved:
                    raise DataError(where, found=f"splits {sorted(saved)}", expected="one of these")
                saved = saved[split]
            return saved.to_iterable_dataset(max(1, len(saved.cache_files))) if streaming else saved
        if files:
            kind = Path(root).suffix.removeprefix(".")
            return datasets.load_dataset(kind, data_files={split: files}, split=split, streaming=streaming)
        if place.is_dir():
            kind = "parquet" if any(place.rglob("*.parquet")) else "imagefolder"
            return datasets.load_dataset(kind, data_dir=root, split=split, streaming=streaming)
        if place.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", root):
            raise DataError(where, found="nothing that can be read", expected=EXPECTED)
        return datasets.load_dataset(root, subset, split=split, streaming=streaming)
    except AcditError:
        raise
    except Exception as error:  # the library's own, pyarrow's, the hub's, the network's
        raise DataError(where, found=f"{type(error).__name__}: {first_line(error)}", expected=EXPECTED) from error


def undecoded(table: Any, image_column: str, label_column: str, where: str) -> Any:
    """The two columns, with pictures as bytes or paths.

    Raises:
        DataError: a column is missing, or the one of pictures holds something else.
    """
    import datasets

    features = table.features
    if features is None:
        raise DataError(where, found="no known columns", expected=f"columns {image_column!r} and {label_column!r}")
    for name, column in (("image_column", image_column), ("label_column", label_column)):
        if column not in features:
            raise DataError(
                f"{where}: data.{name}", found=f"no column {column!r} among {', '.join(features)}",
                expected="one of these", fix=f"set data.{name}",
            )  # fmt: skip
    if image_column == label_column:
        raise DataError(f"{where}: data.image_column, data.label_column", found="the same", expected="two columns")
    kind = features[image_column]
    if not isinstance(kind, datasets.Image) and getattr(kind, "dtype", None) not in ("binary", "large_binary"):
        raise DataError(f"{where}: column {image_column!r}", found=str(kind)[:80], expected="pictures, or their bytes")
    return table.select_columns([image_column, label_column]).cast_column(image_column, datasets.Image(decode=False))


class Labels:
    """Values of the label column → class indices.

    Args:
        feature: of the column: a `ClassLabel`, whole numbers, or text.
        classes: order and names; None takes the data's own.
        distinct: all values of the column where they are known (not in a stream).
        where: for messages.

    Raises:
        DataError: another type, other classes than the list's, or classes that cannot be known.
    """

    def __init__(self, feature: Any, classes: ClassList | None, distinct: Sequence[Any] | None, where: str) -> None:
        self._where = where
        layout = "a column of class numbers or names"
        names = getattr(feature, "names", None)
        dtype = str(getattr(feature, "dtype", feature))
        self._indices: dict[Any, int]
        if names:  # a ClassLabel
            order = {name: index for index, name in enumerate(names)}
            if classes is not None:
                order = classes.indices(names, where, layout)
            self.names = list(classes.names if classes is not None else names)
            self._indices = {value: order[name] for value, name in enumerate(names)}
        elif "string" in dtype or "int" in dtype:
            if distinct is None and classes is None:
                raise DataError(
                    where, found=f"labels of type {dtype}, in a stream", expected="known classes",
                    fix="set data.classes to a file with a class a line",
                )  # fmt: skip
            known = sorted(distinct) if distinct is not None and None not in distinct else []
            if "string" in dtype:
                if classes is not None:
                    self._indices = classes.indices(known or classes.keys, where, layout)
                else:
                    self._indices = {name: index for index, name in enumerate(known)}
                self.names = list(classes.names) if classes is not None else known
            else:
                self.names = numbered(int(known[-1]) + 1 if known else 0, classes, where)
                self._indices = {index: index for index in range(len(self.names))}
        else:
            raise DataError(where, found=f"labels of type {dtype}", expected=layout, fix="set data.label_column")

    def index(self, value: Any, row: str) -> int:
        """Class index of a value.

        Raises:
            DataError: there is no such class; the row is named.
        """
        found = self._indices.get(value)
        if found is None:
            raise DataError(
                row, found=f"label {value!r}", expected=f"one of {len(self.names)} classes of {self._where}"
            )
        return found


def picture_bytes(cell: Any, root: str) -> bytes:
    """The file behind an undecoded picture.

    A table from elsewhere may name any path: only files below `root` are opened, and what `datasets` itself fetched.

    Raises:
        BadPicture: empty, too large, unreadable, or a path outside.
    """
    if not isinstance(cell, dict):
        raise BadPicture("an empty cell")
    data, path = cell.get("bytes"), cell.get("path")
    if data is None and path:
        data = _read_path(str(path), root)
    if data is None:
        raise BadPicture("an empty cell")
    if len(data) > MAX_BYTES:
        raise BadPicture(f"{len(data)} bytes, more than {MAX_BYTES}")
    return bytes(data)


def _read_path(path: str, root: str) -> bytes:
    import datasets
    import fsspec

    if "://" in path:
        # As streaming from the hub names files: hf://…, or zip://member::hf://… for one in an archive.
        if Path(root).exists() or not re.fullmatch(r"((zip|tar)://[^:]*::)?hf://[^:]*", path):
            raise BadPicture(f"the address {path[:100]!r} instead of a picture")
        with fsspec.open(path, "rb") as file:
            return bytes(file.read(MAX_BYTES + 1))
    allowed = [Path(root), Path(datasets.config.HF_DATASETS_CACHE), Path(datasets.config.HF_CACHE_HOME)]
    real = Path(path).resolve()
    if not any(real.is_relative_to(folder.resolve()) for folder in allowed):
        raise BadPicture(f"the path {path[:100]!r}, outside {root}")
    try:
        if not real.is_file():
            raise BadPicture("not a regular file")
        with real.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except OSError as error:
        raise BadPicture(str(error)) from error


class HFDataset(LabelledPictures):
    """Rows of a `datasets` table.

    Args:
        root: see `load_table`.
        split: of the data set.
        channels: 1 (luma) or 3 (RGB).
        size: edge in pixels after resize and crop, or (H, W); None: all pictures have the size of the first.
        max_bad_files: how many pictures may be bad.
        image_column, label_column: which columns to read.
        classes: order and names of the classes; None takes the table's.
        subset: see `load_table`.

    Raises:
        ConfigError, DataError: see `load_table`, `undecoded` and `Labels`; a label out of range.
    """

    def __init__(
        self,
        root: str,
        split: str = "train",
        channels: int = 3,
        size: int | Sequence[int] | None = None,
        max_bad_files: int = 0,
        image_column: str = "image",
        label_column: str = "label",
        classes: ClassList | None = None,
        subset: str | None = None,
    ) -> None:
        super().__init__(channels, size, max_bad_files)
        self._root, self._where = root, f"data.root {root}, split {split!r}"
        table = undecoded(
            load_table(root, split, streaming=False, subset=subset), image_column, label_column, self._where
        )
        column = table.select_columns([label_column]).with_format("arrow")[:][label_column].to_pylist()
        labels = Labels(table.features[label_column], classes, sorted(set(column), key=str), self._where)
        indices = [labels.index(value, self._row(number)) for number, value in enumerate(column)]
        self._set_labels(np.array(indices, dtype=np.int64), labels.names)
        self._pictures, self._column = table.select_columns([image_column]), image_column

    def describe(self, index: int) -> str:
        """Row of the table."""
        return self._row(index)

    def listing(self) -> Iterator[tuple[str, int]]:
        """(sha256 of the picture's bytes, or its path below the root, class) of every row: reads the whole column.

        The library's own fingerprint would cost nothing, but it is of paths, times and the library's version: a table
        that was copied to another disk would be taken for another one.
        """
        return zip(self._identities(), self.labels.tolist(), strict=True)

    def _identities(self) -> Iterator[str]:
        # Whatever way the root was given, the library may name its files by absolute paths or resolved ones.
        roots = list(dict.fromkeys([os.path.abspath(self._root), os.path.realpath(self._root)]))
        for batch in self._pictures.with_format("arrow").iter(_LISTED_AT_ONCE):
            for cells in batch[self._column].chunks:
                fields = dict(zip(cells.type.names, cells.flatten(), strict=True))  # of an empty cell both are null
                for data, path in zip(fields["bytes"], fields["path"].to_pylist(), strict=True):
                    buffer = data.as_buffer()
                    yield _below(path, roots) if buffer is None else hashlib.sha256(buffer).hexdigest()

    def _row(self, index: int) -> str:
        return f"{self._where}, row {index}"

    def _read(self, index: int) -> bytes:
        try:
            cell = self._pictures[index][self._column]
        except Exception as error:  # pyarrow's, of a damaged file
            raise BadPicture(f"{type(error).__name__}: {first_line(error)}") from error
        return picture_bytes(cell, self._root)


def _below(path: str | None, roots: Sequence[str]) -> str:
    """The path relative to the root that holds it, or as it is."""
    for root in roots:
        if path is not None and Path(path).is_relative_to(root):
            return os.path.relpath(path, root)
    return path or ""
