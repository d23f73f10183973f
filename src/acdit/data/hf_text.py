"""Text of Hugging Face `datasets`: a column of a table whose rows are documents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from acdit.data.bad_files import BadFiles
from acdit.data.documents import Cut, Documents, Piece
from acdit.data.hf import load_table
from acdit.data.text_files import plain
from acdit.errors import DataError, first_line

_READ_AT_ONCE = 1000  # rows


def text_column(table: Any, column: str, where: str) -> Any:
    """A table's column of text, as the only one.

    Raises:
        DataError: no such column, or one of something else.
    """
    features = table.features
    if features is not None:  # streams of some formats do not say
        if column not in features:
            raise DataError(
                f"{where}: data.text_column", found=f"no column {column!r} among {', '.join(features)}",
                expected="one of these", fix="set data.text_column",
            )  # fmt: skip
        dtype = str(getattr(features[column], "dtype", features[column]))
        if "string" not in dtype:
            raise DataError(f"{where}: column {column!r}", found=dtype[:80], expected="text")
    return table.select_columns([column])


class TableText(Documents):
    """The rows of a table; places are (row,).

    Args:
        root, split, subset: see `load_table`.
        column: of the text.

    Raises:
        ConfigError, DataError: see `load_table` and `text_column`.
    """

    def __init__(self, root: str, split: str, column: str, subset: str | None = None) -> None:
        self.where = f"data.root {root}, split {split!r}"
        self._table = text_column(load_table(root, split, streaming=False, subset=subset), column, self.where)
        self._column, self._start, self._stop = column, 0, len(self._table)

    def identity(self) -> dict[str, Any]:
        # The library's fingerprint is of the files' paths and times, or of the hub's revision.
        return {
            "kind": "table", "fingerprint": self._table._fingerprint, "column": self._column,
            "start": self._start, "stop": self._stop,
        }  # fmt: skip

    def between(self, start: Sequence[int] | None, stop: Sequence[int] | None) -> TableText:
        made = object.__new__(TableText)
        made.__dict__.update(self.__dict__)
        made._start, made._stop = start[0] if start else self._start, stop[0] if stop else self._stop
        return made

    def pieces(self, cut: Cut, bad: BadFiles, place: Sequence[int] | None = None) -> Iterator[Piece]:
        first = place[0] if place else self._start
        if first >= self._stop:  # `select` wants a row
            return
        rows = self._table.select(range(first, self._stop)).with_format("arrow")
        try:
            for batch in rows.iter(_READ_AT_ONCE):
                for number, value in enumerate(batch[self._column].to_pylist(), first):
                    try:
                        text = plain(value)
                    except ValueError as error:
                        bad.add(f"{self.where}, row {number}", str(error))
                        continue
                    if text.strip():
                        yield Piece(text, True, (number + 1,))
                first += len(batch)
        except (DataError, MemoryError):
            raise
        except Exception as error:  # pyarrow's, of a damaged file
            raise DataError(
                self.where, found=f"a table that cannot be read behind row {first} ({first_line(error)})",
                expected="readable data",
            ) from error  # fmt: skip

    def _boundary(self, held_out: float, bad: BadFiles) -> Sequence[int]:
        total = self._stop - self._start
        number = int(held_out) if held_out >= 1 else max(1, round(held_out * total))
        self._require_rest(total, number)
        return (self._stop - number,)
