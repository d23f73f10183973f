"""Streams: data that are gone through in order, with a length that nobody knows (`data.streaming`).

Every process reads the whole stream, but decodes only its own positions of each global batch: the order then is the
same for any number of processes, at the cost that every process fetches everything. Where that hurts, download the data
set and leave streaming off.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch import Tensor

from acdit.data.bad_files import BadFiles
from acdit.data.classes import ClassList
from acdit.data.hf import Labels, load_table, picture_bytes, undecoded
from acdit.data.picture import BadPicture, decode_picture, height_width, require_channels
from acdit.data.stream_order import Part, Row, StreamOrder
from acdit.errors import ConfigError, DataError, first_line

Sample = tuple[Tensor, int]


class StreamDataset(ABC):
    """Samples by position in the shuffled order of a stream.

    The place of a sample that cannot be decoded is taken by the next good one in the shuffled order; that one comes
    again at its own place.

    Args:
        where: for messages.
        shape: of a sample.
        class_names: by number.
        bad_files: counts what cannot be decoded.
        num_parts: of the stream.
        window: rows that are shuffled together.
        threads: how many decode side by side.
    """

    def __init__(
        self, where: str, shape: tuple[int, ...], class_names: list[str], bad_files: BadFiles, num_parts: int,
        window: int, threads: int = 0,
    ) -> None:  # fmt: skip
        self._where, self._num_parts, self._window = where, num_parts, window
        self.shape, self.class_names, self.num_classes = shape, class_names, len(class_names)
        self.bad_files = bad_files
        """Bad samples met so far in this process."""
        self._pool = ThreadPoolExecutor(threads) if threads else None
        self._lock = threading.Lock()  # a loader reads ahead while a checkpoint asks for the state
        self._state: dict[str, Any] | None = None
        self._order: StreamOrder | None = None

    @abstractmethod
    def _part(self, number: int) -> Part:
        """A part of the stream, from its start."""

    @abstractmethod
    def _decoded(self, row: Row, crop: Sequence[float] | None) -> Sample | str:
        """The sample, or what is wrong with it."""

    def start(self, seed: int, history: int) -> None:
        """Choose the order.

        Args:
            seed: of the run.
            history: how far back from the last sample read `state` may be asked.
        """
        self._order = StreamOrder(self._part, self._num_parts, self._window, seed, history, self._state)

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a state instead of reading everything before again; to be called before `start`."""
        self._state = state

    def state(self, position: int) -> dict[str, Any]:
        """What a checkpoint keeps to go on from a position, as plain data."""
        assert self._order is not None, "start comes first"
        with self._lock:
            return self._order.state(position)

    def samples(self, places: Sequence[tuple[int, Sequence[float] | None]]) -> list[Sample]:
        """Samples and classes at consecutive positions of the order, cropped where told.

        Raises:
            DataError: more bad samples than allowed, an unknown label, or a stream that breaks.
        """
        assert self._order is not None, "start comes first"
        with self._lock:
            rows = self._fetched(self._order.rows, places[0][0], len(places))
        crops = [crop for _, crop in places]
        found = list((self._pool.map if self._pool else map)(self._decoded, rows, crops))
        return [
            self._or_next(row, sample, position, crop)
            for row, sample, (position, crop) in zip(rows, found, places, strict=True)
        ]

    def _or_next(self, row: Row, sample: Sample | str, position: int, crop: Sequence[float] | None) -> Sample:
        assert self._order is not None
        tries, tried = 0, {(row.part, row.number)}
        while isinstance(sample, str):
            self.bad_files.add(self._describe(row), sample)
            tries, tried = tries + 1, tried | {(row.part, row.number)}
            # Two epochs and two windows always hold every row: nothing good among them means nothing good at all.
            if tries > 2 * (len(tried) + self._window):
                raise DataError(
                    self._where, found=f"no readable {self.bad_files.what} in the whole stream", expected="at least one"
                )
            position += 1
            with self._lock:
                row = self._fetched(self._order.peek, position)
            sample = self._decoded(row, crop)
        return sample

    def _fetched(self, read: Any, *arguments: int) -> Any:
        try:
            return read(*arguments)
        except DataError:
            raise
        except (AssertionError, MemoryError):
            raise
        except Exception as error:  # the library's own, pyarrow's, the network's
            raise DataError(
                self._where, found=f"a stream that broke ({type(error).__name__}: {first_line(error)})",
                expected="readable data", fix="repair the file, or go on with --resume when the source is back",
            ) from error  # fmt: skip

    def _describe(self, row: Row) -> str:
        return f"{self._where}, file {row.part} of the stream, row {row.number}"


class PictureStream(StreamDataset):
    """A `datasets` stream of pictures.

    Args:
        root, split, image_column, label_column, classes: as `HFDataset`; the classes must be known beforehand.
        channels: 1 (luma) or 3 (RGB).
        size: edge in pixels after resize and crop, or (H, W).
        max_bad_files: how many pictures may be bad.
        shuffle_buffer: rows that are shuffled together.
        subset: see `load_table`.
        threads: how many decode side by side (Pillow frees the interpreter while it works).

    Raises:
        ConfigError, DataError: see `load_table`, `undecoded` and `Labels`; no size.
    """

    def __init__(
        self,
        root: str,
        split: str = "train",
        channels: int = 3,
        size: int | Sequence[int] | None = None,
        max_bad_files: int = 0,
        image_column: str = "image",
        label_column: str = "label",
        classes: ClassList | None = None,
        shuffle_buffer: int = 1,
        threads: int = 0,
        subset: str | None = None,
    ) -> None:
        require_channels(channels)
        wanted = height_width(size)
        if wanted is None:
            raise ConfigError("data.size", found="nothing", expected="a size: a stream's pictures are not known before")
        self._root, where = root, f"data.root {root}, split {split!r}"
        self._columns = image_column, label_column
        self._table = undecoded(
            load_table(root, split, streaming=True, subset=subset), image_column, label_column, where
        )
        self._labels = Labels(self._table.features[label_column], classes, None, where)
        super().__init__(
            where, (channels, *wanted), self._labels.names, BadFiles(max_bad_files), int(self._table.num_shards),
            shuffle_buffer, threads,
        )  # fmt: skip

    def _part(self, number: int) -> Any:
        return self._table.shard(num_shards=int(self._table.num_shards), index=number)

    def _decoded(self, row: Row, crop: Sequence[float] | None) -> Sample | str:
        """The sample, or what is wrong with its picture."""
        image, label = self._columns
        index = self._labels.index(row.value[label], self._describe(row))
        try:
            data = picture_bytes(row.value[image], self._root)
            return decode_picture(data, self.shape[0], self.shape[1:], crop), index
        except BadPicture as error:
            return str(error)
