"""Clips of video files in one folder a class, or as a list of UCF-101's names them:

root/<class>/….avi      or      root/<split>/<class>/….mp4      or      root/ and trainlist01.txt
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor

from acdit.data.class_folders import ClassFolders, layout
from acdit.data.classes import ClassList
from acdit.data.frame_choice import FrameChoice
from acdit.data.labelled import LabelledFiles
from acdit.data.picture import BadPicture, fitted
from acdit.data.sources import DirectorySource, parent
from acdit.data.split_files import read_split_file
from acdit.data.video import SUFFIXES, header_size, read_clip, require_av
from acdit.errors import ConfigError, DataError

LAYOUT = layout("clip", SUFFIXES)
Place = tuple[Sequence[float] | None, float | None]
"""Draws of a random crop, and of a random start."""


class ClipsDataset(LabelledFiles):
    """Labelled clips (C, T, H, W), decoded by PyAV when asked for; resized and cropped as pictures are, all frames of a
    clip at one place. What becomes of bad files is said at `LabelledFiles`.

    Args:
        root: a directory.
        split: the folder between root and classes. With "train" (the default) it may be missing.
        channels: 1 (luma) or 3 (RGB).
        size: edge in pixels after resize and crop, or (H, W); None: all clips have the size of the first.
        max_bad_files: how many files may be bad.
        classes: order and names of the classes; without `split_file` the folders must be exactly these.
        choice: which frames of a file make its clip.
        split_file: one of UCF-101's lists instead of folders (see `read_split_file`).
        clips_per_file: several: every file is as many samples, one after the other; their clips begin at places evenly
            spread over the file (sample k of n in the middle of the k-th n-th of all places a clip may begin at). Where
            there are fewer places than clips, some clips are equal.

    Raises:
        ConfigError: PyAV is missing; channels other than 1 or 3, a size below 1, both a split and a split file, several
            clips a file from a place that is fixed.
        DataError: no such directory, no class folders, one without clips, other classes than the list's, files of the
            split file that are missing, or what `read_split_file` refuses.
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        channels: int = 3,
        size: int | Sequence[int] | None = None,
        max_bad_files: int = 0,
        classes: ClassList | None = None,
        choice: FrameChoice | None = None,
        split_file: str | Path | None = None,
        clips_per_file: int = 1,
    ) -> None:
        require_av()
        super().__init__(channels, size, max_bad_files, "clip")
        self.root, self.choice, self._per_file = Path(root), choice or FrameChoice(), clips_per_file
        if clips_per_file > 1 and self.choice.start != "random":
            raise ConfigError(
                "data.start",
                found=f"{self.choice.start!r}, and {clips_per_file} clips a file",
                expected="one of the two",
            )
        if not self.root.is_dir():
            found = "a file" if self.root.exists() else "no such directory"
            raise DataError(
                f"data.root {self.root}", found=found, expected=f"a directory with {LAYOUT}",
                fix="unpack an archive first" if self.root.exists() else "check the path",
            )  # fmt: skip
        if self._size is not None:
            self._known_shape = (channels, self.choice.frames, *self._size)
        if split_file is None:
            files = ClassFolders(DirectorySource(self.root), "clip", SUFFIXES).listed(split, classes)
        else:
            if split != "train":
                raise ConfigError("data.split", found=f"{split!r}, and data.split_file", expected="one of the two")
            files = read_split_file(split_file, SUFFIXES, classes)
            self._require_all(files.files, split_file)
        self._files = [file for file in files.files for _ in range(clips_per_file)]
        self._set_labels(np.repeat(files.labels, clips_per_file), files.class_names)

    def describe(self, index: int) -> str:
        """Path of the clip."""
        return str(self.root / self._files[index])

    def listing(self) -> Iterator[tuple[str, int]]:
        """(path below the root, class) of every index; of several clips a file, the path with the clip's number."""
        several = self._per_file > 1
        for index, (file, label) in enumerate(zip(self._files, self.labels.tolist(), strict=True)):
            yield f"{file}#{index % self._per_file}" if several else file, label

    def placed(self, index: int, crop: Sequence[float] | None, start: float | None) -> tuple[Tensor, int]:
        """As `[index]`, cropped where the draws `crop` say (see `random_crop`) and from where the draw `start` says."""
        return self._sample(index, (crop, start))

    def stored_size(self, index: int) -> tuple[int, int] | None:
        """(H, W) that the header declares, before turning, resize and crop; None where the file is bad."""
        try:
            return header_size(self.root / self._files[index])
        except BadPicture:
            return None

    def _decode(self, index: int, place: Place | None) -> Tensor:
        crop, start = place or (None, None)
        if start is None and self._per_file > 1:
            start = (index % self._per_file + 0.5) / self._per_file
        fit = partial(fitted, channels=self._channels, size=self._size, place=crop)
        return read_clip(self.root / self._files[index], self.choice, fit, self._size, start)

    def _skips(self, name: str) -> bool:
        # A file may be damaged in its second half only. Whether its first half is used must not depend on whether some
        # process has already met the second: a resumed run would see other clips.
        return False

    def _describe_class(self, index: int) -> str:
        return str(self.root / parent(self._files[index]))

    def _require_all(self, files: Sequence[str], split_file: str | Path) -> None:
        missing = [file for file in files if not (self.root / file).is_file()]
        if missing:
            raise DataError(
                f"data.root {self.root}",
                found=f"{len(missing):,} of {len(files):,} clips of {split_file} missing, the first {missing[0]}",
                expected="all of them", fix="point data.root at the folder of the class folders",
            )  # fmt: skip
