"""Pictures in one folder a class, in a directory or a zip:

root/<class>/….png      or      root/<split>/<class>/….png
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from acdit.data.class_folders import ClassFolders, layout
from acdit.data.classes import ClassList
from acdit.data.labelled import LabelledPictures
from acdit.data.picture import SUFFIXES
from acdit.data.sources import DirectorySource, ZipSource, parent
from acdit.errors import DataError

LAYOUT = layout("picture", SUFFIXES)


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
        found = ClassFolders(self._source, "picture", SUFFIXES).listed(split, classes)
        self._files = found.files
        self._set_labels(found.labels, found.class_names)

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
