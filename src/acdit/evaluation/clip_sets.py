"""Clips to measure: folders of videos or of folders of frames, npz files, or parts that sampling left."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from acdit.chunks import ChunkStore
from acdit.data.frame_choice import TooShort
from acdit.data.picture import SUFFIXES, BadPicture
from acdit.data.sources import DirectorySource, is_hidden, parent
from acdit.data.video import SUFFIXES as VIDEO_SUFFIXES
from acdit.errors import ConfigError, DataError
from acdit.evaluation.clip_files import ClipCut, natural, read_frames, read_video
from acdit.evaluation.image_sets import StoredSamples, settings_beside, with_channels
from acdit.evaluation.npz_files import file_hash, read_batch

WANTED = "a folder of videos (or of folders of frames), or an .npz with arr_0, uint8 (M, T, H, W, C)"
_FRAMES = tuple(suffix for suffix in SUFFIXES if suffix not in VIDEO_SUFFIXES)


class ClipSet(Protocol):
    """Clips by index, all of one size and length. What `ImageSet` says of pictures holds of them."""

    @property
    def kind(self) -> Literal["clips"]:
        """What an index gives: one clip."""
        ...

    @property
    def cut(self) -> ClipCut:
        """Which frames of the clips these are."""
        ...

    @property
    def description(self) -> dict[str, Any]:
        """What the clips are, as JSON: equal descriptions, equal clips."""
        ...

    @property
    def settings(self) -> dict[str, Any] | None:
        """How they were drawn, where that is recorded beside them."""
        ...

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> Tensor:
        """Clips start … stop − 1, uint8 (n, T, C, H, W)."""
        ...

    def name(self, index: int) -> str:
        """How messages name a clip."""
        ...


def open_clips(where: str, cut: ClipCut, channels: int | None = None, size: int | None = None) -> ClipSet:
    """Open a set of clips.

    Args:
        where: see `WANTED`. In a folder every video file below it is a clip (mp4 and others need the extra `video`,
            gifs do not), or else every folder below it that has frames, in their names' order, frame 2 before frame 10.
        cut: which frames of each.
        channels: 1 or 3: convert to it; None: RGB, and gray ones of an npz stay gray.
        size: resize and crop to this edge (files only); None: all clips have the size of the first.

    Raises:
        DataError: nothing there, no clips, both kinds, a wrong npz, clips that are too short (of an npz; of files when
            they are read).
        ConfigError: a size where nothing is resized.
    """
    path = Path(where)
    if path.is_dir():
        return _ClipFiles(path, cut, channels or 3, size)
    if path.is_file() and path.suffix.lower() == ".npz":
        if size is not None:
            raise ConfigError(
                "--size", found=f"{size}, and clips in {path.name}", expected="clips that are files: only they are "
                "resized", fix="leave --size out, or give a folder",
            )  # fmt: skip
        return _ClipArray(path, cut, channels)
    found = "no such file or folder" if not path.exists() else "a file of another kind"
    raise DataError(where, found=found, expected=WANTED)


def stored_clips(store: ChunkStore, cut: ClipCut, channels: int | None = None) -> ClipSet:
    """The clips of a finished store of `generate`.

    Raises:
        DataError: they are shorter than `cut` needs.
    """
    return _StoredClips(store, cut, channels)


class _ClipFiles:
    kind: Literal["clips"] = "clips"

    def __init__(self, path: Path, cut: ClipCut, channels: int, size: int | None) -> None:
        self._path, self.cut, self._channels, self._size = path, cut, channels, size
        files = [file for file in DirectorySource(path).files if not is_hidden(file)]
        self._clips = {file: [file] for file in sorted(files, key=natural) if file.lower().endswith(VIDEO_SUFFIXES)}
        """Name → its files, below the folder."""
        folders: dict[str, list[str]] = {}
        pictures = sorted((file for file in files if file.lower().endswith(_FRAMES)), key=natural)
        for file in pictures:
            if parent(file):  # beside the clips lies the contact sheet of `acdit sample`
                folders.setdefault(parent(file), []).append(file)
        if self._clips and folders:
            raise DataError(
                str(path), found=f"{len(self._clips)} videos and {len(folders)} folders of frames",
                expected="clips of one kind", fix="give the folder of one of them",
            )  # fmt: skip
        self._clips = self._clips or folders
        if not self._clips:
            raise DataError(
                str(path), found=f"{len(pictures)} pictures and no clips" if pictures else "no clips",
                expected=f"files that end in {', '.join(VIDEO_SUFFIXES)}, or folders of frames",
                fix="pictures are measured without --frames, by an extractor of frames" if pictures else "",
            )  # fmt: skip
        self._names = list(self._clips)
        self.settings = settings_beside(path)
        self._shape: tuple[int, ...] | None = None

    @property
    def description(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for files in self._clips.values():
            for file in files:
                status = (self._path / file).stat()
                digest.update(f"{file} {status.st_size} {status.st_mtime_ns}\n".encode())
        return {
            "kind": "clip files", "name": self._path.name, "count": len(self), "state": digest.hexdigest()[:32],
            "channels": self._channels, "size": self._size, **self.cut.describe(),
        }  # fmt: skip

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return str(self._path / self._names[index])

    def read(self, start: int, stop: int) -> Tensor:
        if self._shape is None:
            self._shape = tuple(self._one(0).shape)
        clips = []
        for index in range(start, stop):
            clip = self._one(index)
            if tuple(clip.shape) != self._shape:
                raise DataError(
                    self.name(index), found=f"{clip.shape[3]}×{clip.shape[2]} pixels",
                    expected=f"{self._shape[3]}×{self._shape[2]}, as {self.name(0)} has",
                    fix="--size N resizes and crops every clip, or keep only clips of one size there",
                )  # fmt: skip
            clips.append(clip)
        return torch.stack(clips)

    def _one(self, index: int) -> Tensor:
        name = self._names[index]
        files = [self._path / file for file in self._clips[name]]
        try:
            if len(files) == 1 and name.lower().endswith(VIDEO_SUFFIXES):
                return read_video(files[0], self.cut, self._channels, self._size)
            return read_frames(files, self.cut, self._channels, self._size)
        except TooShort as error:
            raise too_short(self.name(index), error.found, self.cut) from None
        except BadPicture as error:
            raise DataError(
                self.name(index), found=f"a bad clip ({error})", expected="one that can be read",
                fix="repair or remove it",
            ) from None  # fmt: skip


class _ClipArray:
    """`arr_0`, uint8 (M, T, H, W, C). Where the file has it uncompressed it is mapped, not read."""

    kind: Literal["clips"] = "clips"

    def __init__(self, path: Path, cut: ClipCut, channels: int | None) -> None:
        self._path, self.cut, self._channels = path, cut, channels
        self._array, self.settings = read_batch(path, "M, T, H, W, C")
        if self._array.shape[1] < cut.span:
            raise too_short(f"{path}: arr_0", self._array.shape[1], cut)
        self.description = {
            "kind": "npz of clips", "name": path.name, "count": len(self), "state": file_hash(path),
            "channels": channels, **cut.describe(),
        }  # fmt: skip

    def __len__(self) -> int:
        return len(self._array)

    def name(self, index: int) -> str:
        return f"{self._path}: arr_0[{index}]"

    def read(self, start: int, stop: int) -> Tensor:
        clips = torch.from_numpy(np.array(self._array[start:stop, self.cut.places])).movedim(-1, 2).contiguous()
        return with_channels(clips, self._channels, lambda index: self.name(start + index))


class _StoredClips:
    kind: Literal["clips"] = "clips"

    def __init__(self, store: ChunkStore, cut: ClipCut, channels: int | None) -> None:
        self._clips, self.cut, self._channels = StoredSamples(store), cut, channels
        frames = self._clips.read(0, 1).shape[1]
        if frames < cut.span:
            raise too_short("clips of the model", frames, cut)
        self.settings = self._clips.settings
        self.description = {**self._clips.description, "channels": channels, **cut.describe()}

    def __len__(self) -> int:
        return len(self._clips)

    def name(self, index: int) -> str:
        return f"clip {index}"

    def read(self, start: int, stop: int) -> Tensor:
        clips = self._clips.read(start, stop)[:, self.cut.places]
        return with_channels(clips, self._channels, lambda index: self.name(start + index))


def too_short(name: str, found: int, cut: ClipCut) -> DataError:
    """What is said of a clip with fewer frames than are measured."""
    stride = f" at --frame-stride {cut.stride}" if cut.stride > 1 else ""
    longest = max(0, -(-found // cut.stride))
    return DataError(
        name, found=f"a clip of {found} frames", expected=f"at least {cut.span} (--frames {cut.frames}{stride})",
        fix=f"longer clips, or --frames {longest}" if longest else "longer clips",
    )  # fmt: skip
