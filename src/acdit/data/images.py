"""Pictures in one folder a class, in a directory or a zip:

root/<class>/….png      or      root/<split>/<class>/….png
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from acdit.data.classes import ClassList
from acdit.data.labelled import LabelledPictures
from acdit.data.picture import SUFFIXES
from acdit.data.sources import DirectorySource, ZipSource, is_hidden, parent
from acdit.errors import DataError

logger = logging.getLogger(__name__)

LAYOUT = "one folder a class with pictures in it: <root>/<class>/*.png, or <root>/<split>/<class>/*.png"


class ImagesDataset(LabelledPictures):
    """Class-per-folder pictures, listed at construction and decoded when asked for.

    Classes are numbered in sorted order of their folders' names, or as a class list says. What becomes of bad files is
    said at `LabelledPictures`.

    Args:
        root: a directory or a zip; a zip may hold one folder around everything.
        split: the folder between root and classes. With "train" (the default) it may be missing.
        channels: 1 (luma) or 3 (RGB).
        size: edge in pixels after resize and crop, or (H, W); None: all pictures have the size of the first.
        max_bad_files: how many files may be bad.
        classes: order and names of the classes; the folders must be exactly these.

    Raises:
        ConfigError: channels other than 1 or 3, a size below 1.
        DataError: no such root, no class folders, a class folder without pictures, other classes than the list's.
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        channels: int = 3,
        size: int | Sequence[int] | None = None,
        max_bad_files: int = 0,
        classes: ClassList | None = None,
    ) -> None:
        super().__init__(channels, size, max_bad_files)
        self.root = Path(root)
        self._source = self._open()
        base = self._find_base(split)
        members = self._class_members(base)
        order = sorted(members)
        names = order
        if classes is not None:
            indices = classes.indices(order, self._source.describe(base), LAYOUT)
            order, names = sorted(order, key=indices.__getitem__), list(classes.names)
        self._files: list[str] = []
        labels: list[int] = []
        for label, folder in enumerate(order):
            self._files += sorted(members[folder])
            labels += [label] * (len(self._files) - len(labels))
        self._set_labels(labels, names)

    def describe(self, index: int) -> str:
        """Path of the picture."""
        return self._source.describe(self._files[index])

    def listing(self) -> Iterator[tuple[str, int]]:
        """(path below the root, class) of every index."""
        return zip(self._files, self.labels.tolist(), strict=True)

    def _read(self, index: int) -> bytes:
        return self._source.read(self._files[index])

    def _describe_class(self, index: int) -> str:
        return self._source.describe(parent(self._files[index]))

    def _open(self) -> DirectorySource | ZipSource:
        if self.root.is_dir():
            return DirectorySource(self.root)
        if self.root.is_file():
            return ZipSource(self.root)
        raise DataError(
            f"data.root {self.root}", found="no such file or directory", expected=f"a directory or zip with {LAYOUT}"
        )

    def _find_base(self, split: str) -> str:
        """The folder whose subfolders are the classes."""
        base = ""
        while True:
            folders = self._subfolders(base)
            if split in folders and self._subfolders(_join(base, split)):
                return _join(base, split)
            # A zip often wraps everything in one folder: one that holds folders and no pictures of its own.
            wrapped = isinstance(self._source, ZipSource) and len(folders) == 1 and not self._has_pictures(base)
            if not wrapped or not self._subfolders(_join(base, folders[0])):
                break
            if self._has_pictures(_join(base, folders[0])):
                break
            base = _join(base, folders[0])
        if split != "train":
            raise DataError(
                f"data.split {split!r}",
                found=f"no folder {self._source.describe(split)} with class folders",
                expected=f"<root>/{split}/<class>/*.png",
                fix=f"name a split that is there; the root holds {self._subfolders('')[:10]}",
            )
        return base

    def _class_members(self, base: str) -> dict[str, list[str]]:
        """Class name → its pictures, at any depth below the class folder."""
        members: dict[str, list[str]] = {name: [] for name in self._subfolders(base)}
        hidden = sorted(path for path in self._source.folders if parent(path) == base and is_hidden(path))
        where = self._source.describe(base)
        if not members:
            found = "pictures outside any class folder" if self._has_pictures(base) else "no class folders"
            if hidden:
                found += f" but hidden ones: {hidden}"
            raise DataError(where, found=found, expected=LAYOUT)
        if hidden:
            logger.warning("%s: hidden folders are no classes: %s", where, hidden)
        prefix, others = _join(base, ""), 0
        for path in self._source.files:
            if not path.startswith(prefix) or is_hidden(path):
                continue
            name, slash, _ = path[len(prefix) :].partition("/")
            if slash and path.lower().endswith(SUFFIXES):
                members[name].append(path)
            else:
                others += 1
        empty = sorted(name for name, paths in members.items() if not paths)
        if empty:
            raise DataError(
                self._source.describe(_join(base, empty[0])),
                found=f"a class folder without pictures ({len(empty)} such: {', '.join(empty[:5])})",
                expected=f"{LAYOUT}; pictures end in {', '.join(SUFFIXES)}",
                fix="add pictures or remove the folder",
            )
        if others:
            logger.warning("%s: %d files that are no pictures of a class are ignored", where, others)
        return members

    def _subfolders(self, base: str) -> list[str]:
        """Names of the visible folders directly in `base`, sorted."""
        return sorted(
            path.rpartition("/")[2] for path in self._source.folders if parent(path) == base and not is_hidden(path)
        )

    def _has_pictures(self, base: str) -> bool:
        return any(
            parent(path) == base and not is_hidden(path) and path.lower().endswith(SUFFIXES)
            for path in self._source.files
        )


def _join(base: str, name: str) -> str:
    return f"{base}/{name}" if base else name
