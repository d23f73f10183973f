"""Where files lie: a directory, or a zip that is read in place (nothing is ever unpacked)."""

from __future__ import annotations

import os
import stat
import zipfile
from pathlib import Path
from typing import Any

from acdit.data.picture import MAX_BYTES, BadPicture
from acdit.errors import DataError, first_line


def is_hidden(path: str) -> bool:
    """Dot files, dot folders and what is in them, and the folder macOS adds to zips."""
    return path.startswith((".", "__MACOSX")) or "/." in path or "/__MACOSX" in path


def parent(path: str) -> str:
    """The folder a path lies in; "" is the root."""
    return path.rpartition("/")[0]


def is_plain_path(path: str) -> bool:
    """Whether a name in an archive is a relative path that stays below its root, with "/" between its parts."""
    parts = path.removesuffix("/").split("/")
    return "\\" not in path and ":" not in parts[0] and not any(part in ("", ".", "..") for part in parts)


class DirectorySource:
    """All files and folders below a directory; links are followed, each folder once.

    Paths are plain strings relative to the root, with "/": a large data set has millions of them.

    Args:
        root: the directory.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files: list[str] = []
        self.folders: list[str] = []
        seen: set[str] = set()
        for folder, subfolders, names in os.walk(root, followlinks=True, onerror=self._fail):
            real = os.path.realpath(folder)
            if real in seen:  # a link back to a folder above
                subfolders.clear()
                continue
            seen.add(real)
            here = Path(folder).relative_to(root).as_posix()
            prefix = "" if here == "." else f"{here}/"
            self.folders += [prefix + name for name in subfolders]
            self.files += [prefix + name for name in names]

    def describe(self, path: str) -> str:
        """How messages name a file or folder of this source."""
        return str(self.root / path)

    def read(self, path: str) -> bytes:
        """The file's bytes.

        Raises:
            BadPicture: not a regular file, unreadable, or larger than `MAX_BYTES`.
        """
        full = self.root / path
        try:
            status = full.stat()
            if not stat.S_ISREG(status.st_mode):  # a pipe would block for ever
                raise BadPicture("not a regular file")
            if status.st_size > MAX_BYTES:
                raise BadPicture(f"{status.st_size} bytes, more than {MAX_BYTES}")
            return full.read_bytes()
        except OSError as error:
            raise BadPicture(str(error)) from error

    def _fail(self, error: OSError) -> None:
        raise DataError(
            f"data.root {self.root}", found=f"a folder that cannot be listed: {error}", fix="make it readable"
        )


class ZipSource:
    """All entries of a zip. Every process opens the file for itself, so that workers do not share a file position.

    Args:
        root: the zip.

    Raises:
        DataError: not a zip, encrypted, or with paths that point outside it.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._handle: zipfile.ZipFile | None = None
        self._handle_process = -1
        self.files: list[str] = []
        folders: dict[str, None] = {}
        for entry in self._zip().infolist():
            self._require_harmless(entry)
            if not entry.is_dir():
                self.files.append(entry.filename)
            folder = parent(entry.filename)  # of "a/b/" this is "a/b"
            while folder and folder not in folders:
                folders[folder] = None
                folder = parent(folder)
        self.folders: list[str] = list(folders)

    def describe(self, path: str) -> str:
        """How messages name an entry or folder of this zip."""
        return f"{self.root}:{path}"

    def read(self, path: str) -> bytes:
        """The entry's bytes, checked against its checksum.

        Raises:
            BadPicture: damaged, larger than `MAX_BYTES` once unpacked, or packed in a way that cannot be read in part.
        """
        try:
            entry = self._zip().getinfo(path)
            if entry.file_size > MAX_BYTES:
                raise BadPicture(f"unpacks to {entry.file_size} bytes, more than {MAX_BYTES}")
            # zipfile unpacks bzip2 and lzma whole, whatever they hold.
            if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise BadPicture(f"packed by method {entry.compress_type}; only stored and deflated entries are read")
            # The size is what the directory of the zip declares. Asked for that many bytes, zipfile unpacks no more;
            # `read()` without a number would unpack everything and cut it afterwards.
            with self._zip().open(entry) as file:
                data = file.read(entry.file_size)
            if len(data) != entry.file_size:
                raise BadPicture(f"unpacks to {len(data)} bytes, declared as {entry.file_size}")
            return data
        except BadPicture:
            raise
        except Exception as error:  # BadZipFile, zlib.error, EOFError, NotImplementedError (compression), OSError
            raise BadPicture(f"{type(error).__name__}: {error}") from error

    def _zip(self) -> zipfile.ZipFile:
        if self._handle is None or self._handle_process != os.getpid():
            try:
                self._handle = zipfile.ZipFile(self.root)
            except Exception as error:  # BadZipFile, OSError, NotImplementedError, UnicodeDecodeError, …
                raise DataError(
                    f"data.root {self.root}",
                    found=f"a file that is not a readable zip ({first_line(error)})",
                    expected="a zip",
                ) from error
            self._handle_process = os.getpid()
        return self._handle

    def _require_harmless(self, entry: zipfile.ZipInfo) -> None:
        name = entry.filename
        if not is_plain_path(name):
            raise DataError(
                f"data.root {self.root}",
                found=f"entry {name!r}, which is no plain relative path",
                expected="paths like class/picture.png",
                fix="make the zip anew from files you trust",
            )
        if entry.flag_bits & 1:
            raise DataError(
                f"data.root {self.root}", found=f"entry {name!r} is encrypted", expected="a zip without password"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": None}
