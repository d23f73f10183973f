"""Pictures in one folder a class, in a directory or a zip:

root/<class>/….png      or      root/<split>/<class>/….png
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from acdit.data.picture import SUFFIXES, BadPicture, decode_picture
from acdit.data.sources import DirectorySource, ZipSource, is_hidden, parent
from acdit.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

LAYOUT = "one folder a class with pictures in it: <root>/<class>/*.png, or <root>/<split>/<class>/*.png"


class ImagesDataset:
    """Class-per-folder pictures; classes are numbered in sorted order of their folders' names.

    Files are listed at construction and decoded when asked for. A file that cannot be decoded is named in a warning
    and counted; its place is taken by the next good file of its class in sorted order (after the last comes the
    first), so which picture stands at an index follows from the files alone, never from the order of reading. Each
    process counts the bad files it has met; one more than `max_bad_files` stops the run.

    Args:
        root: a directory or a zip; a zip may hold one folder around everything.
        split: the folder between root and classes. With "train" (the default) it may be missing.
        channels: 1 (luma) or 3 (RGB).
        size: edge in pixels after resize and centre crop; None: all pictures have the size of the first.
        max_bad_files: how many files may be bad.

    Raises:
        ConfigError: channels other than 1 or 3, a size below 1.
        DataError: no such root, no class folders, a class folder without pictures, more bad files than allowed.
    """

    def __init__(
        self, root: str | Path, split: str = "train", channels: int = 3, size: int | None = None, max_bad_files: int = 0
    ) -> None:
        if channels not in (1, 3):
            raise ConfigError("data.channels", found=str(channels), expected="1 or 3")
        if size is not None and size < 1:
            raise ConfigError("data.size", found=str(size), expected="a positive number of pixels")
        self.root = Path(root)
        self.max_bad_files = max_bad_files
        self.bad_files: dict[str, str] = {}
        """Bad files met so far in this process, with the reason."""
        self._channels, self._size = channels, size
        self._source = self._open()
        base = self._find_base(split)
        members = self._class_members(base)
        self.class_names = sorted(members)
        self.num_classes = len(self.class_names)
        self._files: list[str] = []
        self.labels: list[int] = []
        """Class of every index."""
        self._bounds: list[tuple[int, int]] = []
        for label, name in enumerate(self.class_names):
            start = len(self._files)
            self._files += sorted(members[name])
            self.labels += [label] * (len(self._files) - start)
            self._bounds.append((start, len(self._files)))
        self._shape: tuple[int, int, int] | None = None if size is None else (channels, size, size)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W); without `size` the first picture says it."""
        if self._shape is None:
            first, _ = self._picture(0)
            self._shape = (first.shape[0], first.shape[1], first.shape[2])
        return self._shape

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """(C, H, W) uint8 and the class index.

        Raises:
            DataError: more bad files than allowed, or a picture of another size where no `size` is given.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        shape = self.shape
        picture, path = self._picture(index % len(self))
        if tuple(picture.shape) != shape:
            raise DataError(
                self._source.describe(path),
                found=f"{picture.shape[2]}×{picture.shape[1]} pixels",
                expected=f"{shape[2]}×{shape[1]}, as in the first picture",
                fix="set data.size to resize and crop all pictures to one size",
            )
        return picture, self.labels[index % len(self)]

    def file_at(self, index: int) -> str:
        """How messages name the file whose picture stands at an index.

        Raises:
            DataError: more bad files than allowed.
        """
        return self._source.describe(self._picture(index % len(self))[1])

    def listing(self) -> Iterator[tuple[str, int]]:
        """(path below the root, class) of every index: what the order of samples follows from."""
        return zip(self._files, self.labels, strict=True)

    def _picture(self, index: int) -> tuple[Tensor, str]:
        start, stop = self._bounds[self.labels[index]]
        for step in range(stop - start):
            path = self._files[start + (index - start + step) % (stop - start)]
            name = self._source.describe(path)
            if name in self.bad_files:
                continue
            try:
                return decode_picture(self._source.read(path), self._channels, self._size), path
            except BadPicture as error:
                self._count_bad(name, str(error))
        raise DataError(
            self._source.describe(parent(self._files[start])),
            found="no readable picture in this class",
            expected=LAYOUT,
        )

    def _count_bad(self, name: str, reason: str) -> None:
        self.bad_files[name] = reason
        if len(self.bad_files) > self.max_bad_files:
            raise DataError(
                name,
                found=f"a bad picture ({reason}), number {len(self.bad_files)} of this run",
                expected=f"at most {self.max_bad_files} bad files (data.max_bad_files)",
                fix="repair or remove the file, or raise data.max_bad_files to skip some",
            )
        logger.warning("skipped bad picture %s (%s), %d so far", name, reason, len(self.bad_files))

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
