"""The order of a stream: shuffled, the same in every process, and resumable without reading it from the start.

A stream gives rows one after the other. They are put in order in windows: rows w·W … (w+1)·W − 1 of the endless stream
are permuted by a permutation keyed by (seed, w), so that position p of the order always lies in window p // W. A
reservoir, the usual shuffle buffer, mixes a little further, but what is in it follows from all rows before: it cannot
be resumed without reading them again (`datasets` loses its content). Here a resumed run needs the stream's state at the
start of one window, which a checkpoint carries, and reads at most that window (and what `datasets` reads again to get
back to a row inside a file) a second time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from acdit import draws
from acdit.errors import DataError, StorageError


class EmptyStream(DataError):
    """No part of the stream has a row."""


class Part(Protocol):
    """A file, or another part of a stream, that can go on from a state; `datasets.IterableDataset` is one."""

    def __iter__(self) -> Iterator[Any]: ...

    def state_dict(self) -> dict[str, Any]:
        """Plain data; the iteration after `load_state_dict` goes on behind the last row that was given."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Set where the next iteration starts."""
        ...


@dataclass(frozen=True)
class Row:
    """A row of the stream, and where it stands: the same in every epoch."""

    value: Any
    part: int
    number: int


class _Endless:
    """All parts, in an order keyed by the epoch, one epoch after the other."""

    def __init__(
        self, open_part: Callable[[int], Part], num_parts: int, seed: int, state: dict[str, Any] | None
    ) -> None:
        self._open_part, self._num_parts, self._seed = open_part, num_parts, seed
        at = state or {"epoch": 0, "place": 0, "row": 0, "rows_in_epoch": 0, "part": None}
        self._epoch, self._place, self._row = at["epoch"], at["place"], at["row"]
        self._rows_in_epoch, self._start = at["rows_in_epoch"], at["part"]
        self._part: Part | None = None
        self._rows: Iterator[Any] = iter(())

    def next(self) -> Row:
        while True:
            number = int(
                draws.permutation(self._num_parts, seed=self._seed, stream="parts", step=self._epoch)[self._place]
            )
            if self._part is None:
                self._part = self._open_part(number)
                if self._start is not None:
                    self._part.load_state_dict(self._start)
                self._rows, self._start = iter(self._part), None
            try:
                value = next(self._rows)
            except StopIteration:
                self._end_part()
                continue
            self._row += 1
            self._rows_in_epoch += 1
            return Row(value, number, self._row - 1)

    def _end_part(self) -> None:
        self._part, self._row, self._place = None, 0, self._place + 1
        if self._place == self._num_parts:
            if self._rows_in_epoch == 0:
                raise EmptyStream("data.root", found="a stream without rows", expected="at least one")
            self._epoch, self._place, self._rows_in_epoch = self._epoch + 1, 0, 0

    def state(self) -> dict[str, Any]:
        part = self._start if self._part is None or self._row == 0 else self._part.state_dict()
        return {
            "epoch": self._epoch, "place": self._place, "row": self._row, "rows_in_epoch": self._rows_in_epoch,
            "part": part,
        }  # fmt: skip


class StreamOrder:
    """Rows of an endless stream by their position in its shuffled order.

    Positions must be asked for in rising order; each process may leave out what it does not need. Up to two
    windows of rows are held in memory.

    Args:
        open_part: the part of a number, from its start.
        num_parts: how many there are; their order is drawn anew every epoch.
        window: how many rows are shuffled together; 1 keeps the stream's own order.
        seed: of the run.
        history: how far back from the last position asked for `state` may be asked.
        state: from `state`, to go on from.

    Raises:
        StorageError: the state is of another stream.
    """

    def __init__(
        self,
        open_part: Callable[[int], Part],
        num_parts: int,
        window: int,
        seed: int,
        history: int = 0,
        state: dict[str, Any] | None = None,
    ) -> None:
        self._window, self._seed, self._history, self._num_parts = window, seed, history, num_parts
        if state is not None and (state["window"], state["num_parts"]) != (window, num_parts):
            raise StorageError(
                "the checkpoint's place in the stream",
                found=f"{state['num_parts']} parts and a window of {state['window']}",
                expected=f"{num_parts} and {window}, as data.root and data.shuffle_buffer say now",
                fix="restore the files of the stream, or start a new run",
            )
        self._rows = _Endless(open_part, num_parts, seed, None if state is None else state["start"])
        self._next = 0 if state is None else state["index"]  # the window that is read next, or in part
        self._first = 0  # the first window that is still asked for
        self._held: dict[int, list[Row]] = {}
        self._states: dict[int, dict[str, Any]] = {}
        self._permutation = (-1, draws.permutation(1, seed=seed, stream="window"))

    def rows(self, start: int, count: int) -> list[Row]:
        """The rows at positions start … start + count − 1; what lies before can no longer be asked for."""
        self._forget(start)
        found = [self.peek(position) for position in range(start, start + count)]
        window, offset = divmod(start + count - 1, self._window)
        self._read(window + 1, offset + 1)  # ahead at the pace of use: the next window is there when its turn comes
        return found

    def peek(self, position: int) -> Row:
        """The row at a position; nothing before it is forgotten."""
        window, offset = divmod(position, self._window)
        self._read(window, self._window)
        return self._held[window][int(self._order(window)[offset])]

    def state(self, position: int) -> dict[str, Any]:
        """What a checkpoint keeps to go on from a position, as plain data."""
        window = position // self._window
        self._read(window, 0)
        start = self._states[window]
        return {"index": window, "window": self._window, "num_parts": self._num_parts, "start": start}

    def _read(self, window: int, count: int) -> None:
        """Have the first `count` rows of a window, in the stream's own order, and all windows before it."""
        while self._next <= window:
            if self._next not in self._held:
                self._states[self._next] = self._rows.state()
                self._held[self._next] = []
            held = self._held[self._next]
            while len(held) < (count if self._next == window else self._window):
                held.append(self._rows.next())
            if len(held) < self._window:
                return
            if self._next < self._first:
                del self._held[self._next]
            self._next += 1

    def _order(self, window: int) -> Any:
        if self._permutation[0] != window:
            self._permutation = window, draws.permutation(self._window, seed=self._seed, stream="window", step=window)
        return self._permutation[1]

    def _forget(self, start: int) -> None:
        self._first = start // self._window
        for old in [known for known in self._held if known < min(self._first, self._next)]:
            del self._held[old]
        for old in [known for known in self._states if known < (start - self._history) // self._window]:
            del self._states[old]
