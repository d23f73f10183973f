"""Directories that are there wholly or not at all: used by checkpoints, published models and caches.

A directory is written under a temporary name beside its place, gets a manifest with the sha256 of every file (written
last: it is the commit marker), is synced to disk and renamed into place. Whenever the process or the machine dies,
the name holds either what it held before or the whole new content.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import logging
import math
import os
import re
import shutil
import socket
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from acdit.errors import StorageError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FOR_PEOPLE = "README.md"
"""May be edited in a committed directory: it is listed in the manifest, and `verify` passes over it."""
_TEMPORARY = ".tmp-"
_OF_SAFETENSORS = re.compile(r"\.tmp[A-Za-z0-9]{6}")  # files that its save_file writes first, beside the one it is for
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def _step(name: str) -> None:
    """Test seam: called before every step that changes the disk, so that a test can kill the process there."""


@dataclass(frozen=True)
class Manifest:
    """What a committed directory holds: relative path → (bytes, sha256)."""

    files: Mapping[str, tuple[int, str]]

    @property
    def total_bytes(self) -> int:
        return sum(size for size, _ in self.files.values())

    def text(self) -> str:
        """The manifest file. It carries its own digest, so that a flipped bit in it is noticed too."""
        listing = {name: {"bytes": size, "sha256": digest} for name, (size, digest) in sorted(self.files.items())}
        digest = hashlib.sha256(json.dumps(listing).encode()).hexdigest()
        return json.dumps({"files": listing, "sha256": digest}, indent=2) + "\n"


@contextlib.contextmanager
def atomic_directory(path: str | Path, expected_bytes: int = 0) -> Iterator[Path]:
    """A temporary directory to write into; it becomes `path` when the block ends without an error.

    A directory that was written this way before (or an empty one) is replaced. After an error the temporary
    directory is removed and `path` is as it was.

    Args:
        path: where the directory shall be; missing parents are made.
        expected_bytes: what is about to be written, as far as it is known: that much room is required beforehand.

    Raises:
        StorageError: there is no room (the bytes needed are named), the place cannot be written, or it holds something
            else.
    """
    path = Path(path)
    _require_replaceable(path)
    temporary = path.with_name(f"{_TEMPORARY}{path.name}-{_unique()}")
    try:
        require_room(path, expected_bytes)
        _make_parents(path)
        _step("make temporary")
        temporary.mkdir()
        yield temporary
        _commit(temporary, path)
    except BaseException as error:
        written = _size(temporary)
        shutil.rmtree(temporary, ignore_errors=True)
        code = _error_number(error)
        if code is None:
            raise
        raise _explained(error, code, path, max(expected_bytes, written)) from error


def _commit(temporary: Path, path: Path) -> None:
    inside = sorted(temporary.rglob("*"))
    files = {file.relative_to(temporary).as_posix(): file for file in inside if not file.is_dir()}
    if MANIFEST in files:
        raise StorageError(f"{path}", found=f"a file {MANIFEST} of its own", expected="another name: it is reserved")
    for file in files.values():
        _step("sync file")
        _sync(file)
    manifest = Manifest({name: (file.stat().st_size, file_sha256(file)) for name, file in files.items()})
    _step("write manifest")
    (temporary / MANIFEST).write_text(manifest.text(), encoding="utf-8")
    _step("sync manifest")
    _sync(temporary / MANIFEST)
    for directory in (*(place for place in reversed(inside) if place.is_dir()), temporary):
        _step("sync directory")
        _sync(directory)
    _put_in_place(temporary, path)


def _put_in_place(temporary: Path, path: Path) -> None:
    """Rename into place. Where something is replaced, both names change in one system call if the system can."""
    if not path.exists():
        _step("rename")
        temporary.rename(path)
        _step("sync parent")
        _sync(path.parent)
        return
    _step("exchange")
    if _exchange(temporary, path):
        aside = temporary
    else:
        aside = path.with_name(f"{_TEMPORARY}old-{path.name}-{_unique()}")
        _step("move the old aside")
        path.rename(aside)
        _step("rename")
        try:
            temporary.rename(path)
        except OSError:
            aside.rename(path)
            raise
    _step("sync parent")
    _sync(path.parent)
    _step("remove the old")
    shutil.rmtree(aside)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names at once (Linux); False where the system or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is None:
        return False
    return bool(renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0)


def write_json_atomic(path: str | Path, value: Any) -> None:
    """Write a JSON file wholly or not at all; raises as `write_text_atomic`. NaN and infinity stay as Python writes and
    reads them: settings may hold them."""
    write_text_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_figures(path: str | Path, figures: Any) -> None:
    """`write_json_atomic` of results, for others than Python too: NaN and infinity, which JSON has not, are null."""
    write_json_atomic(path, _finite(figures))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_text_atomic(path: str | Path, text: str) -> None:
    """Write a text file wholly or not at all.

    Raises:
        StorageError: there is no room (the bytes needed are named), or the place cannot be written.
    """
    with atomic_file(path, expected_bytes=len(text.encode())) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def atomic_file(path: str | Path, expected_bytes: int = 0, durable: bool = True) -> Iterator[Path]:
    """A temporary path to write a file to; it becomes `path` when the block ends without an error.

    Args:
        path: where the file shall be; missing parents are made, a file there is replaced.
        expected_bytes: what is about to be written, for the message when there is no room.
        durable: wait for the disk, so that the file outlives the machine's death; False for what can be made again.

    Raises:
        StorageError: there is no room (the bytes needed are named), or the place cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f"{_TEMPORARY}{path.name}-{_unique()}")
    try:
        _make_parents(path)
        _step("write")
        yield temporary
        if durable:
            _sync(temporary)
        _step("replace")
        temporary.replace(path)
        if durable:
            _sync(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        code = _error_number(error)
        if code is None:
            raise
        raise _explained(error, code, path, expected_bytes) from error


def require_room(path: str | Path, needed: int) -> None:
    """Check that `needed` bytes are free where `path` is or will be.

    Raises:
        StorageError: they are not; the bytes needed are named.
    """
    free = free_bytes(path)
    if free < needed:
        raise _no_room(Path(path), errno.ENOSPC, needed, free)


def verify(path: str | Path, may_miss: Collection[str] = ()) -> Manifest:
    """Check every file of a committed directory against its manifest.

    Args:
        path: the directory.
        may_miss: files whose absence is no fault; they are checked where they are present.

    Raises:
        StorageError: no manifest, a file missing, truncated or changed; the file is named.
    """
    path = Path(path)
    manifest = _read_manifest(path)
    fix = "use another copy; delete the manifest only if you changed the files yourself"
    for name, (size, digest) in manifest.files.items():
        if name == FOR_PEOPLE:
            continue
        file = path / name
        try:
            found_size = file.stat().st_size
            found = file_sha256(file) if found_size == size else ""
        except OSError as error:
            if name in may_miss and not file.exists():
                continue
            raise StorageError(f"{file}", found=f"{error.strerror}", expected=f"{size:,} bytes", fix=fix) from None
        if found_size != size:
            expected = f"{size:,} bytes: it is {'truncated' if found_size < size else 'too long'}"
            raise StorageError(f"{file}", found=f"{found_size:,} bytes", expected=expected, fix=fix)
        if found != digest:
            expected = f"{digest[:16]}…: its content has changed"
            raise StorageError(f"{file}", found=f"sha256 {found[:16]}…", expected=expected, fix=fix)
    return manifest


def _read_manifest(path: Path) -> Manifest:
    file = path / MANIFEST
    try:
        text = file.read_text(encoding="utf-8")
        entries = json.loads(text)["files"]
        manifest = Manifest({name: (entry["bytes"], entry["sha256"]) for name, entry in entries.items()})
        intact = text == manifest.text()
    except FileNotFoundError:
        raise StorageError(f"{file}", found="no such file", expected="the manifest of a committed directory") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StorageError(f"{file}", found=f"unreadable ({error})", expected="a manifest") from None
    if not intact:
        raise StorageError(f"{file}", found="another content than was written", expected="an unchanged manifest")
    return manifest


def is_committed(path: str | Path) -> bool:
    """Whether the directory carries its commit marker; `verify` says whether it is whole."""
    return (Path(path) / MANIFEST).is_file()


def move_aside(path: Path, prefix: str) -> Path:
    """Give a file or directory a name of its own, <prefix>-<name>-…, beside its place; the new path."""
    aside = path.with_name(f"{prefix}-{path.name}-{_unique()}")
    _step("move aside")
    path.rename(aside)
    _sync(path.parent)
    return aside


def remove_directory(path: Path) -> None:
    """Remove a directory so that a kill never leaves half of it under its name."""
    aside = move_aside(path, f"{_TEMPORARY}gone")
    _step("remove the doomed")
    shutil.rmtree(aside)


def clean_leftovers(parent: str | Path) -> list[Path]:
    """Remove what killed processes left behind. To be called by the holder of the run's lock.

    An old directory that was moved aside for one that never arrived is put back.

    Returns:
        What was removed.
    """
    removed = []
    for place in sorted(Path(parent).glob(".tmp*")):
        if not place.name.startswith(_TEMPORARY) and not (place.is_file() and _OF_SAFETENSORS.fullmatch(place.name)):
            continue
        old = re.fullmatch(rf"{re.escape(_TEMPORARY)}old-(.+)-\d+-[0-9a-f]{{8}}", place.name)
        if old and not place.with_name(old[1]).exists() and is_committed(place):
            logger.warning("%s: a save was cut off; what was there before is put back", old[1])
            place.rename(place.with_name(old[1]))
            continue
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place, ignore_errors=True)
        else:
            place.unlink(missing_ok=True)
        removed.append(place)
    return removed


class RunLock:
    """One process at a time in a run's directory; the kernel frees it when the process dies, however it dies.

    Args:
        run: the directory.
        wait: for another process to leave, instead of an error.

    Raises:
        StorageError: on entering, when another process holds it (its pid is named), or it cannot be made.
    """

    def __init__(self, run: str | Path, wait: bool = False) -> None:
        self.path, self._wait = Path(run) / ".lock", wait
        self._file: TextIO | None = None

    def __enter__(self) -> RunLock:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+", encoding="utf-8")
        except OSError as error:
            raise _explained(error, error.errno or 0, self.path, 0) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | (0 if self._wait else fcntl.LOCK_NB))
        except OSError as error:
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            if not isinstance(error, BlockingIOError):
                raise _explained(error, error.errno or 0, self.path, 0) from error
            raise StorageError(
                f"{self.path.parent}", found=f"a run in progress ({holder})", expected="one run a directory",
                fix="wait for it, stop it, or choose another --output",
            ) from None  # fmt: skip
        self._file.truncate(0)
        self._file.write(f"pid {os.getpid()} on {socket.gethostname()}")
        self._file.flush()
        # A forked child (a data loader's worker) shares the lock: were it to outlive us, the lock would live on.
        os.register_at_fork(after_in_child=self.__exit__)
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def free_bytes(path: str | Path) -> int:
    """Free bytes where `path` is or will be."""
    place = Path(path).absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def _require_replaceable(path: Path) -> None:
    if not path.exists():
        return
    if path.is_dir() and (is_committed(path) or not any(path.iterdir())):
        return
    raise StorageError(
        f"{path}", found="a directory with other things in it" if path.is_dir() else "a file",
        expected="nothing there, or what this program wrote", fix="choose another place, or move that away",
    )  # fmt: skip


def _make_parents(path: Path) -> None:
    missing = [place for place in path.absolute().parents if not place.exists()]
    for place in reversed(missing):
        place.mkdir(exist_ok=True)
        _sync(place.parent)


def _unique() -> str:
    return f"{os.getpid()}-{os.urandom(4).hex()}"


def _error_number(error: BaseException) -> int | None:
    """The system's error number behind an exception; safetensors reports one in words ("os error 28")."""
    if isinstance(error, OSError):
        return error.errno or 0
    if type(error).__name__ == "SafetensorError" and (said := re.search(r"os error (\d+)", str(error))):
        return int(said[1])
    return None


def explained(error: OSError) -> StorageError:
    """A system error as the user reads it: the file, what is wrong, what helps."""
    return _explained(error, error.errno or 0, Path(error.filename or "a file"), 0)


def _explained(error: BaseException, code: int, path: Path, needed: int) -> StorageError:
    if code in _FULL:
        return _no_room(path, code, needed, free_bytes(path))
    reason = os.strerror(code) if code else str(error)
    where = getattr(error, "filename", None)
    where = None if where is None or str(where) == str(path) else where
    return StorageError(
        f"{path}", found=f"{reason}{f' ({where})' if where else ''}", expected="a place that can be written",
        fix="check its permissions, or choose another place",
    )  # fmt: skip


def _no_room(path: Path, code: int, needed: int, free: int) -> StorageError:
    return StorageError(
        f"{path}", found=f"no room ({os.strerror(code)}): {free:,} bytes are free",
        expected=f"at least {needed:,} bytes" if needed else "room for more",
        fix="free some space, or choose another output directory",
    )  # fmt: skip


def file_sha256(file: Path) -> str:
    """sha256 of a file's content, in hexadecimal."""
    with file.open("rb") as stream:
        digest = hashlib.sha256()
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _size(directory: Path) -> int:
    return sum(file.lstat().st_size for file in directory.rglob("*") if not file.is_dir())


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
