"""One folder a class, in a directory or a zip: where the classes are and which files are theirs."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from acdit.data.classes import ClassList
from acdit.data.sources import DirectorySource, ZipSource, is_hidden, parent
from acdit.errors import DataError

logger = logging.getLogger(__name__)


def layout(what: str, suffixes: tuple[str, ...]) -> str:
    """What is expected where class folders lie, for messages."""
    files = f"*{suffixes[0]}"
    return f"one folder a class with {what}s in it: <root>/<class>/{files}, or <root>/<split>/<class>/{files}"


@dataclass(frozen=True)
class ClassFiles:
    """Files class after class."""

    files: list[str]
    """Below the root, sorted inside a class."""
    labels: list[int]
    class_names: list[str]


@dataclass(frozen=True)
class ClassFolders:
    """What lies in class folders.

    Args:
        source: the files.
        what: they hold, for messages: "picture", "clip".
        suffixes: of such files, the first for messages.
    """

    source: DirectorySource | ZipSource
    what: str
    suffixes: tuple[str, ...]

    @property
    def layout(self) -> str:
        """What is expected, for messages."""
        return layout(self.what, self.suffixes)

    def listed(self, split: str, classes: ClassList | None) -> ClassFiles:
        """The files of a split. Classes are numbered in sorted order of their folders' names, or as a list says.

        Args:
            split: the folder between root and classes. With "train" it may be missing.
            classes: order and names of the classes; the folders must be exactly these.

        Raises:
            DataError: no class folders, one without such a file, other classes than the list's.
        """
        base = self._base(split)
        members = self._members(base)
        order = sorted(members)
        names = order
        if classes is not None:
            indices = classes.indices(order, self.source.describe(base), self.layout)
            order, names = sorted(order, key=indices.__getitem__), list(classes.names)
        files: list[str] = []
        labels: list[int] = []
        for label, folder in enumerate(order):
            files += sorted(members[folder])
            labels += [label] * (len(files) - len(labels))
        return ClassFiles(files, labels, names)

    def _base(self, split: str) -> str:
        """The folder whose subfolders are the classes."""
        base = ""
        while True:
            folders = self._subfolders(base)
            if split in folders and self._subfolders(_join(base, split)):
                return _join(base, split)
            # A zip often wraps everything in one folder: one that holds folders and no files of its own.
            wrapped = isinstance(self.source, ZipSource) and len(folders) == 1 and not self._has_files(base)
            if not wrapped or not self._subfolders(_join(base, folders[0])):
                break
            if self._has_files(_join(base, folders[0])):
                break
            base = _join(base, folders[0])
        if split != "train":
            raise DataError(
                f"data.split {split!r}",
                found=f"no folder {self.source.describe(split)} with class folders",
                expected=f"<root>/{split}/<class>/*{self.suffixes[0]}",
                fix=f"name a split that is there; the root holds {self._subfolders('')[:10]}",
            )
        return base

    def _members(self, base: str) -> dict[str, list[str]]:
        """Class name → its files, at any depth below the class folder."""
        members: dict[str, list[str]] = {name: [] for name in self._subfolders(base)}
        hidden = sorted(path for path in self.source.folders if parent(path) == base and is_hidden(path))
        where = self.source.describe(base)
        if not members:
            found = f"{self.what}s outside any class folder" if self._has_files(base) else "no class folders"
            if hidden:
                found += f" but hidden ones: {hidden}"
            raise DataError(where, found=found, expected=self.layout)
        if hidden:
            logger.warning("%s: hidden folders are no classes: %s", where, hidden)
        prefix, others = _join(base, ""), 0
        for path in self.source.files:
            if not path.startswith(prefix) or is_hidden(path):
                continue
            name, slash, _ = path[len(prefix) :].partition("/")
            if slash and path.lower().endswith(self.suffixes):
                members[name].append(path)
            else:
                others += 1
        empty = sorted(name for name, paths in members.items() if not paths)
        if empty:
            raise DataError(
                self.source.describe(_join(base, empty[0])),
                found=f"a class folder without {self.what}s ({len(empty)} such: {', '.join(empty[:5])})",
                expected=f"{self.layout}; {self.what}s end in {', '.join(self.suffixes)}",
                fix=f"add {self.what}s or remove the folder",
            )
        if others:
            logger.warning("%s: %d files that are no %ss of a class are ignored", where, others, self.what)
        return members

    def _subfolders(self, base: str) -> list[str]:
        """Names of the visible folders directly in `base`, sorted."""
        return sorted(
            path.rpartition("/")[2] for path in self.source.folders if parent(path) == base and not is_hidden(path)
        )

    def _has_files(self, base: str) -> bool:
        return any(
            parent(path) == base and not is_hidden(path) and path.lower().endswith(self.suffixes)
            for path in self.source.files
        )


def _join(base: str, name: str) -> str:
    return f"{base}/{name}" if base else name
