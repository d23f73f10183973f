"""Tar shards as a set of byte ranges: listed once, then read at offsets; nothing is ever unpacked."""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from glob import glob
from pathlib import Path

from acdit.data.picture import MAX_BYTES, BadPicture
from acdit.data.sources import is_plain_path
from acdit.errors import DataError

EXPECTED = "a whole, uncompressed .tar"
_BLOCK = 512
_MAX_EXPANSION = 1_000_000


@dataclass(frozen=True)
class Member:
    """A file in a shard."""

    name: str
    offset: int
    size: int


class Shard:
    """One tar. Every read opens the file for itself: workers share nothing, and thousands of shards need no handles.

    Args:
        path: the tar; relative names keep their meaning, wherever the process is started.

    Raises:
        DataError: there is no such file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            status = path.stat()
        except OSError as error:
            raise self._refused(error.strerror or str(error), EXPECTED) from None
        self._stamp = status.st_size, status.st_mtime_ns

    def describe(self, name: str) -> str:
        """How messages name a member."""
        return f"{self.path}:{name}"

    def members(self) -> Iterator[Member]:
        """The regular files, in the order of the tar; only headers are read.

        Raises:
            DataError: not a tar, compressed, truncated or damaged, or with a member that is no plain file under a plain
                relative path.
        """
        try:
            with self.path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members = []  # type: ignore[attr-defined]  # or it keeps every one, ten thousands a shard
                    name = member.name.removeprefix("./")
                    if member.isdir():
                        continue
                    if not member.isreg() or member.issparse():
                        raise self._refused(f"member {name!r}, which is a link, device or sparse", "plain files only")
                    if not is_plain_path(name):
                        raise self._refused(f"member {name!r}, which is no plain relative path", "like a/000123.jpg")
                    if member.offset_data + member.size > self._stamp[0]:
                        raise self._refused(f"an end before that of member {name!r}: it is truncated", EXPECTED)
                    yield Member(name, member.offset_data, member.size)
                # tarfile takes the first block that is no header for the end; only zeros are.
                file.seek(tar.offset)
                end = file.read(_BLOCK)
            if len(end) < _BLOCK or any(end):
                found = "no end mark: it is truncated" if len(end) < _BLOCK else f"a damaged header at {tar.offset}"
                raise self._refused(found, EXPECTED)
        except tarfile.TarError as error:
            raise self._refused(f"a file that is no readable tar ({error})", EXPECTED) from None
        except (OSError, EOFError, ValueError, OverflowError, RecursionError) as error:
            if isinstance(error, DataError):
                raise
            raise self._refused(f"unreadable data ({error})", EXPECTED) from None

    def read(self, offset: int, size: int) -> bytes:
        """A member's bytes.

        Raises:
            BadPicture: larger than `MAX_BYTES`, or unreadable.
            DataError: the shard has changed since it was listed.
        """
        if size > MAX_BYTES:
            raise BadPicture(f"{size} bytes, more than {MAX_BYTES}")
        try:
            with self.path.open("rb", buffering=0) as file:
                status = os.fstat(file.fileno())
                if (status.st_size, status.st_mtime_ns) != self._stamp:
                    raise self._refused("another file than at the start of the run", "unchanged shards")
                data = os.pread(file.fileno(), size, offset)
        except OSError as error:
            raise BadPicture(str(error)) from error
        if len(data) != size:
            raise BadPicture(f"{len(data)} bytes of {size}")
        return data

    def _refused(self, found: str, expected: str) -> DataError:
        return DataError(str(self.path), found=found, expected=expected, fix="make the shard anew")


def find_shards(pattern: str, split: str) -> list[Path]:
    """Paths of the shards that `data.root` names, in order.

    Args:
        pattern: a tar, a pattern (shards-{000..010}.tar, {a,b}.tar, *.tar), or a directory with tars in it or in its
            folder `split`.
        split: only looked at for a directory.

    Raises:
        DataError: nothing there, or one of the named shards is missing.
    """
    here = Path(pattern)
    if here.is_dir():
        for folder in (here / split, here) if split == "train" else (here / split,):
            if found := sorted(folder.glob("*.tar")):
                return found
        raise DataError(
            f"data.root {pattern}", found="a directory without .tar files",
            expected=f"shards in it or in {here / split}" if split == "train" else f"shards in {here / split}",
        )  # fmt: skip
    paths: list[Path] = []
    for name in _braces(pattern):
        found = sorted(Path(match) for match in glob(name)) if re.search(r"[*?[]", name) else [Path(name)]
        if not found or not found[0].is_file():
            raise DataError(
                f"data.root {pattern}", found=f"no file {name}",
                expected="shards: a .tar, a directory of them, or a pattern like shards-{000..010}.tar or *.tar",
            )  # fmt: skip
        paths += found
    return list(dict.fromkeys(paths))


def _braces(pattern: str) -> list[str]:
    """Expand {000..010} (padded as written) and {a,b}, leftmost first."""
    done, waiting = [], [pattern]
    while waiting:
        text = waiting.pop()
        match = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", text)
        if match is None:
            done.append(text)
            continue
        if match[3] is None:
            first, last, width = int(match[1]), int(match[2]), len(match[1])
            if abs(last - first) >= _MAX_EXPANSION:
                raise DataError(f"data.root {pattern}", found=f"{match[0]}", expected=f"fewer than {_MAX_EXPANSION}")
            step = 1 if last >= first else -1
            parts = [f"{number:0{width}d}" for number in range(first, last + step, step)]
        else:
            parts = match[3].split(",")
        if len(done) + len(waiting) + len(parts) > _MAX_EXPANSION:
            raise DataError(f"data.root {pattern}", found="too many shards", expected=f"at most {_MAX_EXPANSION}")
        waiting += [text[: match.start()] + part + text[match.end() :] for part in reversed(parts)]
    return done
