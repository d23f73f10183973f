"""Pictures of classes that lie in files and are decoded when asked for: what folders, zips, tars and tables share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np
from torch import Tensor

from acdit.data.bad_files import BadFiles
from acdit.data.picture import BadPicture, decode_picture, header_size, height_width, require_channels
from acdit.errors import DataError


class LabelledPictures(ABC):
    """A map from index to (uint8 picture, class).

    A file that cannot be decoded is named in a warning and counted; its place is taken by the next good file of its
    class (after the last comes the first), so which picture stands at an index follows from the files alone, never from
    the order of reading.

    Args:
        channels: 1 (luma) or 3 (RGB).
        size: edge in pixels after resize and crop, or (H, W); None: all pictures have the size of the first.
        max_bad_files: how many files may be bad.

    Raises:
        ConfigError: channels other than 1 or 3, a size below 1.
    """

    class_names: list[str]

    def __init__(self, channels: int, size: int | Sequence[int] | None, max_bad_files: int) -> None:
        require_channels(channels)
        self._channels, self._size = channels, height_width(size)
        self._shape = None if self._size is None else (channels, *self._size)
        self.bad_files = BadFiles(max_bad_files)
        """Bad files met so far in this process."""

    @abstractmethod
    def describe(self, index: int) -> str:
        """How messages name the file at an index."""

    @abstractmethod
    def listing(self) -> Iterator[tuple[str, int]]:
        """(what tells the sample from others, class) of every index: by this an interrupted work knows its data again.

        The same in every process, and wherever the data lie; other data, or another order, give another listing.
        """

    @abstractmethod
    def _read(self, index: int) -> bytes:
        """The file's bytes; raises `BadPicture` where there are none."""

    def _describe_class(self, index: int) -> str:
        return f"class {self.class_names[self.labels[index]]!r}, the one of {self.describe(index)}"

    def _set_labels(self, labels: Sequence[int] | np.ndarray, class_names: Sequence[str]) -> None:
        self.labels = np.asarray(labels, dtype=np.int64)
        """Class of every index."""
        self.class_names = list(class_names)
        self.num_classes = len(self.class_names)
        # Indices class by class, the place of each index in there, and where each class begins.
        self._by_class = np.argsort(self.labels, kind="stable")
        self._rank = np.empty_like(self._by_class)
        self._rank[self._by_class] = np.arange(len(self.labels))
        self._starts = np.searchsorted(self.labels[self._by_class], np.arange(self.num_classes + 1))

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W); without `size` the first picture says it."""
        if self._shape is None:
            first, _ = self._picture(0, None)
            self._shape = (first.shape[0], first.shape[1], first.shape[2])
        return self._shape

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """(C, H, W) uint8 and the class index; cropped in the centre.

        Raises:
            DataError: more bad files than allowed, or a picture of another size where no `size` is given.
        """
        return self.cropped(index, None)

    def cropped(self, index: int, place: Sequence[float] | None) -> tuple[Tensor, int]:
        """As `[index]`, cropped where the draws `place` say (see `random_crop`)."""
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        shape = self.shape
        picture, name = self._picture(index, place)
        if tuple(picture.shape) != shape:
            raise DataError(
                name,
                found=f"{picture.shape[2]}×{picture.shape[1]} pixels",
                expected=f"{shape[2]}×{shape[1]}, as in the first picture",
                fix="set data.size to resize and crop all pictures to one size",
            )
        return picture, int(self.labels[index])

    def file_at(self, index: int) -> str:
        """How messages name the file whose picture stands at an index: another of its class where its own is bad.

        Raises:
            DataError: more bad files than allowed.
        """
        return self._picture(index % len(self), None)[1]

    def stored_size(self, index: int) -> tuple[int, int] | None:
        """(H, W) as it lies in the file, before EXIF, resize and crop; None where the file is bad."""
        try:
            return header_size(self._read(index))
        except BadPicture:
            return None

    def _picture(self, index: int, place: Sequence[float] | None) -> tuple[Tensor, str]:
        for mate in self._class_mates(index):
            name = self.describe(mate)
            if name in self.bad_files:
                continue
            try:
                return decode_picture(self._read(mate), self._channels, self._size, place), name
            except BadPicture as error:
                self.bad_files.add(name, str(error))
        raise DataError(self._describe_class(index), found="no readable picture in this class", expected="at least one")

    def _class_mates(self, index: int) -> Iterator[int]:
        """The index, then the others of its class from there on, once around."""
        label = self.labels[index]
        start, stop = int(self._starts[label]), int(self._starts[label + 1])
        for step in range(stop - start):
            yield int(self._by_class[start + (int(self._rank[index]) - start + step) % (stop - start)])
