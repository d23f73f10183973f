"""Streams of text: documents tokenised as they come, joined by EOS and cut into sequences, resumable to the token.

Each part (file) of the stream is a row of tokens of its own; a rest at its end that fills no sequence is left out. What
is shuffled are sequences, in the windows of `StreamOrder`. Where the next sequence begins inside a document, a
checkpoint keeps the library's state before that document and how many of its tokens are behind: no text, no tokens.
Every process tokenises everything, since nobody knows beforehand where a sequence begins; data that are read more than
once are better tokenised once (`data.streaming=false`).
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from acdit.codecs.text import Tokenizer
from acdit.data.bad_files import BadFiles
from acdit.data.documents import Cut, Documents, Piece, require_whole
from acdit.data.hf import load_table
from acdit.data.hf_text import text_column
from acdit.data.stream import Sample, StreamDataset
from acdit.data.stream_order import EmptyStream, Row
from acdit.data.text import Wrap
from acdit.data.text_files import plain
from acdit.errors import ConfigError, DataError


class _SequencesOfPart:
    """The chunks of one part of a stream; a `Part` of `StreamOrder`.

    Args:
        rows: the library's stream of this part.
        name: for messages.
        limit: rows that belong to it; None: all.
    """

    def __init__(
        self, rows: Any, column: str, tokenizer: Tokenizer, chunk: int, bad: BadFiles, name: str, limit: int | None
    ) -> None:
        self._rows, self._column, self._tokenizer, self._chunk = rows, column, tokenizer, chunk
        self._bad, self._name, self._limit = bad, name, limit
        self._at: dict[str, Any] = {"rows": None, "number": 0, "skip": 0}
        """The state before the document in which the next sequence begins, its number, how many tokens are behind."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._at = dict(state_dict)
        if self._at["rows"] is not None:
            self._rows.load_state_dict(self._at["rows"])

    def state_dict(self) -> dict[str, Any]:
        return dict(self._at)

    def __iter__(self) -> Iterator[np.ndarray]:
        state, number = self._at["rows"], self._at["number"]
        begin = self._at["skip"]  # of the next sequence; tokens count from the first document read here
        tokens, have = np.empty(0, dtype=np.int64), 0  # those from `begin` on, and where they end
        starts: deque[tuple[int, dict[str, Any]]] = deque()  # documents that reach behind `begin`
        rows = iter(self._rows)
        while self._limit is None or number < self._limit:
            try:
                row = next(rows)
            except StopIteration:
                return
            ids = self._ids(row, number)
            starts.append((have, {"rows": state, "number": number}))
            state, number = self._rows.state_dict(), number + 1
            tokens = np.concatenate([tokens, ids[max(0, begin - have) :]])
            have += len(ids)
            taken = 0
            while have - begin >= self._chunk:
                begin, taken = begin + self._chunk, taken + self._chunk
                while len(starts) > 1 and starts[1][0] <= begin:
                    starts.popleft()
                self._at = {**starts[0][1], "skip": begin - starts[0][0]}
                yield tokens[taken - self._chunk : taken]
            tokens = tokens[taken:]

    def _ids(self, row: Any, number: int) -> np.ndarray:
        """Of one document, EOS behind them; none of a bad or an empty one."""
        try:
            text = plain(row.get(self._column))
        except ValueError as error:
            self._bad.add(f"{self._name}, row {number}", str(error))
            return np.empty(0, dtype=np.int64)
        if not text.strip():
            return np.empty(0, dtype=np.int64)
        try:
            return np.append(self._tokenizer.encode_batch([text])[0], self._tokenizer.eos_token_id)
        except DataError as error:
            raise DataError(
                f"{self._name}, row {number}", found=error.found, expected=error.expected, fix=error.fix
            ) from None


class TextStream(StreamDataset):
    """A `datasets` stream of documents as sequences of token ids: int64 (S,) and 0.

    Args:
        root, split, subset: see `load_table`.
        column: of the text.
        tokenizer: whose ids.
        wrap: how sequences are made.
        max_bad_files: how many rows may be without text.
        shuffle_buffer: sequences that are shuffled together.
        held_out: how many documents at the end of the stream are left out: the parts that hold them are counted once.

    Raises:
        ConfigError, DataError: see `load_table` and `text_column`; a share instead of a number.
    """

    def __init__(
        self, root: str, split: str, column: str, tokenizer: Tokenizer, wrap: Wrap, *, subset: str | None = None,
        max_bad_files: int = 0, shuffle_buffer: int = 1, held_out: float = 0,
    ) -> None:  # fmt: skip
        where = f"data.root {root}, split {split!r}"
        self._table = text_column(load_table(root, split, streaming=True, subset=subset), column, where)
        self._column = column
        self.tokenizer, self.wrap, self.protocol = tokenizer, wrap, wrap.protocol
        self.vocab_size = tokenizer.vocab_size
        self._limits = _limits(self._table, held_out, where)
        super().__init__(
            where, (wrap.length,), ["text"], BadFiles(max_bad_files, what="row"), len(self._limits), shuffle_buffer
        )

    def _fetched(self, read: Any, *arguments: int) -> Any:
        try:
            return super()._fetched(read, *arguments)
        except EmptyStream:
            raise DataError(
                self._where, found="no file with enough text",
                expected=f"at least {self.wrap.chunk:,} tokens in one of them, for one sequence",
                fix="lower data.sequence_length (and model.grid), or give more text",
            ) from None  # fmt: skip

    def _part(self, number: int) -> _SequencesOfPart:
        return _SequencesOfPart(
            _shard(self._table, number), self._column, self.tokenizer, self.wrap.chunk, self.bad_files,
            f"{self._where}, file {number} of the stream", self._limits[number],
        )  # fmt: skip

    def _decoded(self, row: Row, crop: Sequence[float] | None) -> Sample | str:
        return self.wrap.sequence(row.value), 0


class TailOfStream(Documents):
    """The last documents of a stream, as a source to be tokenised once; places are (part, row).

    Args:
        root, split, subset, column: as `TextStream`.
        held_out: how many.

    Raises:
        ConfigError, DataError: as `TextStream`.
    """

    def __init__(self, root: str, split: str, column: str, held_out: float, subset: str | None = None) -> None:
        self.where = f"data.root {root}, split {split!r}, the last {held_out:.0f}"
        self._table = text_column(load_table(root, split, streaming=True, subset=subset), column, self.where)
        self._root, self._column, self._subset = root, column, subset
        limits = _limits(self._table, held_out, self.where)
        # The first part that is not wholly of the rest, and where in it the documents begin.
        last = len(limits) - 1
        self._start = (last, limits[last]) if limits[last] is not None else (last + 1, 0)

    def identity(self) -> dict[str, Any]:
        return {
            "kind": "tail", "root": self._root, "subset": self._subset, "column": self._column,
            "parts": int(self._table.num_shards), "start": list(self._start), "where": self.where,
        }  # fmt: skip

    def between(self, start: Sequence[int] | None, stop: Sequence[int] | None) -> Documents:
        raise ConfigError("data.held_out", found="a part of the end of a stream", expected="the end itself")

    def pieces(self, cut: Cut, bad: BadFiles, place: Sequence[int] | None = None) -> Iterator[Piece]:
        first, skip = place or self._start
        for part in range(first, int(self._table.num_shards)):
            rows = itertools.islice(enumerate(_shard(self._table, part)), skip if part == first else 0, None)
            for number, row in rows:
                try:
                    text = plain(row.get(self._column))
                except ValueError as error:
                    bad.add(f"{self.where}, file {part} of the stream, row {number}", str(error))
                    continue
                if text.strip():
                    yield Piece(text, True, (part, number + 1))


def _shard(table: Any, number: int) -> Any:
    return table.shard(num_shards=int(table.num_shards), index=number)


def _limits(table: Any, held_out: float, where: str) -> list[int | None]:
    """How many rows of each part are left when the last `held_out` of all are taken away (None: all of them); parts of
    which nothing is left are not listed. Reads the parts at the end until enough rows were seen."""
    limits: list[int | None] = [None] * int(table.num_shards)
    if held_out == 0:
        return limits
    require_whole(held_out)
    if held_out < 1:
        raise ConfigError(
            "data.held_out", found=f"{held_out:g}, of a stream", expected="a number of documents",
            fix="nobody knows a stream's length: give a number, or set data.streaming=false",
        )  # fmt: skip
    missing = int(held_out)
    while limits and missing:
        rows = sum(1 for _ in _shard(table, len(limits) - 1))
        if rows > missing:
            limits[-1] = rows - missing
            return limits
        missing -= rows
        limits.pop()
    if not limits:
        raise DataError(
            where, found=f"{int(held_out) - missing:,} documents", expected=f"more than the {held_out:,.0f} of "
            "data.held_out", fix="lower data.held_out",
        )  # fmt: skip
    return limits
