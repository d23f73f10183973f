"""Directories that are there wholly or not at all: used by checkpoints, published models and caches.

A directory is written under a temporary name beside its place, gets a manifest with the sha256 of every file (written
last: it is the commit marker), is synced to disk and renamed into place. Whatever happens in between, the name holds
either what it held before or the whole new content.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from acdit.errors import StorageError

MANIFEST = "manifest.json"
_TEMPORARY = ".tmp-"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _step(name: str) -> None:
    """Test seam: called before every durable step, so that a test can kill the process there. Does nothing."""


@dataclass(frozen=True)
class Manifest:
    """What a committed directory holds: relative path → (bytes, sha256)."""

    files: dict[str, tuple[int, str]]

    @property
    def total_bytes(self) -> int:
        return sum(size for size, _ in self.files.values())


@contextlib.contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """A temporary directory to write into; it becomes `path` when the block ends without an error.

    An existing `path` is replaced. After an error the temporary directory is removed and `path` is as it was.

    Raises:
        StorageError: the disk is full (with the bytes needed), or cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f"{_TEMPORARY}{path.name}-{os.getpid()}-{os.urandom(4).hex()}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        _commit(temporary, path)
    except OSError as error:
        needed = _size(temporary)
        shutil.rmtree(temporary, ignore_errors=True)
        raise _explained(error, path, needed) from error
    except BaseException as error:
        needed = _size(temporary)
        shutil.rmtree(temporary, ignore_errors=True)
        # safetensors reports a full disk in words of its own.
        if "os error" in str(error).lower() and not isinstance(error, StorageError):
            raise StorageError(
                f"{path}", found=f"{error} after {needed:,} bytes; {free_bytes(path):,} bytes are free",
                expected="room to write", fix="free some space, or choose another output directory",
            ) from error  # fmt: skip
        raise


def _commit(temporary: Path, path: Path) -> None:
    files = {str(file.relative_to(temporary)): file for file in sorted(temporary.rglob("*")) if file.is_file()}
    for file in files.values():
        _step("sync file")
        _sync(file)
    manifest = {name: {"bytes": file.stat().st_size, "sha256": _sha256(file)} for name, file in files.items()}
    _step("write manifest")
    (temporary / MANIFEST).write_text(json.dumps({"files": manifest}, indent=2), encoding="utf-8")
    _step("sync manifest")
    _sync(temporary / MANIFEST)
    for directory in [*(place for place in temporary.rglob("*") if place.is_dir()), temporary]:
        _step("sync directory")
        _sync(directory)
    aside = None
    if path.exists():
        aside = path.with_name(f"{_TEMPORARY}old-{path.name}-{os.getpid()}-{os.urandom(4).hex()}")
        _step("move the old aside")
        path.rename(aside)
    _step("rename")
    temporary.rename(path)
    _step("sync parent")
    _sync(path.parent)
    if aside is not None:
        _step("remove the old")
        shutil.rmtree(aside)


def verify(path: str | Path) -> Manifest:
    """Check every file of a committed directory against its manifest.

    Raises:
        StorageError: no manifest, a file missing, truncated or changed; the file is named.
    """
    path = Path(path)
    manifest = _read_manifest(path)
    for name, (size, digest) in manifest.files.items():
        file = path / name
        if not file.is_file():
            raise StorageError(
                f"{file}", found="no such file", expected=f"{size:,} bytes", fix="use another checkpoint"
            )
        if file.stat().st_size != size:
            raise StorageError(
                f"{file}", found=f"{file.stat().st_size:,} bytes", expected=f"{size:,} bytes: it is truncated",
                fix="use another checkpoint",
            )  # fmt: skip
        found = _sha256(file)
        if found != digest:
            raise StorageError(
                f"{file}", found=f"sha256 {found[:16]}…", expected=f"{digest[:16]}…: its content has changed",
                fix="use another checkpoint",
            )  # fmt: skip
    return manifest


def _read_manifest(path: Path) -> Manifest:
    file = path / MANIFEST
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))["files"]
        return Manifest({str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in entries.items()})
    except FileNotFoundError:
        raise StorageError(f"{file}", found="no such file", expected="the manifest of a committed directory") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StorageError(f"{file}", found=f"unreadable ({error})", expected="a manifest") from None


def is_committed(path: str | Path) -> bool:
    """Whether the directory carries its commit marker; `verify` says whether it is whole."""
    return (Path(path) / MANIFEST).is_file()


def clean_leftovers(parent: str | Path) -> list[Path]:
    """Remove what killed processes left behind. To be called by the holder of the run's lock.

    An old directory that was moved aside for one that never arrived is put back.
    """
    removed = []
    for place in sorted(Path(parent).glob(f"{_TEMPORARY}*")):
        name = re.fullmatch(rf"{re.escape(_TEMPORARY)}old-(.+)-\d+-[0-9a-f]{{8}}", place.name)
        if name and not (Path(parent) / name[1]).exists() and is_committed(place):
            place.rename(Path(parent) / name[1])
            continue
        shutil.rmtree(place, ignore_errors=True) if place.is_dir() else place.unlink(missing_ok=True)
        removed.append(place)
    return removed


def committed_checkpoints(run: str | Path) -> list[tuple[int, Path]]:
    """(step, path) of every checkpoint-N with a commit marker, oldest first."""
    found = []
    for place in Path(run).glob("checkpoint-*"):
        name = _CHECKPOINT.fullmatch(place.name)
        if name and is_committed(place):
            found.append((int(name[1]), place))
    return sorted(found)


def prune(run: str | Path, keep: int) -> list[Path]:
    """Remove the oldest checkpoints, so that `keep` verified ones stay; damaged ones do not count and are left."""
    whole = []
    for _, path in committed_checkpoints(run):
        try:
            verify(path)
        except StorageError:
            continue
        whole.append(path)
    doomed = whole[:-keep] if keep else whole
    for path in doomed:
        remove_directory(path)
    return doomed


def remove_directory(path: Path) -> None:
    """Remove a directory so that a kill never leaves half of it under its name."""
    aside = path.with_name(f"{_TEMPORARY}gone-{path.name}-{os.getpid()}-{os.urandom(4).hex()}")
    _step("move the doomed aside")
    path.rename(aside)
    _step("remove the doomed")
    shutil.rmtree(aside)


def write_json_atomic(path: str | Path, value: Any) -> None:
    """Write a JSON file wholly or not at all."""
    path = Path(path)
    temporary = path.with_name(f"{_TEMPORARY}{path.name}-{os.getpid()}")
    try:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _explained(error, path, 0) from error


def free_bytes(path: str | Path) -> int:
    """Free bytes where `path` is or will be."""
    place = Path(path).absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


class RunLock:
    """One process at a time in a run's directory; freed by the kernel when the process dies.

    Raises:
        StorageError: on entering, when another process holds it; its pid is named.
    """

    def __init__(self, run: str | Path) -> None:
        self.path = Path(run) / ".lock"
        self._file: Any = None

    def __enter__(self) -> RunLock:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            raise StorageError(
                f"{self.path.parent}", found=f"a run in progress ({holder})", expected="one run a directory",
                fix="wait for it, stop it, or choose another --output",
            ) from None  # fmt: skip
        self._file.truncate(0)
        self._file.write(f"pid {os.getpid()} on {socket.gethostname()}")
        self._file.flush()
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _explained(error: OSError, path: Path, needed: int) -> StorageError:
    if error.errno in _FULL:
        return StorageError(
            f"{path}", found=f"no room ({os.strerror(error.errno)}): {free_bytes(path):,} bytes are free",
            expected=f"more than the {needed:,} bytes written so far",
            fix="free some space, or choose another output directory",
        )  # fmt: skip
    return StorageError(f"{path}", found=f"{error.strerror or error}", expected="a place that can be written")


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        digest = hashlib.sha256()
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _size(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
