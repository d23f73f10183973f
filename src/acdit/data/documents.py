"""Documents: where text comes from, one after the other, and how part of them is held out."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from acdit.data.bad_files import BadFiles
from acdit.errors import ConfigError, DataError

PARTS = ("train", "held_out")
BUILT_IN = "tinyshakespeare.txt"
BUILT_IN_HELD_OUT = 0.1
Cut = Callable[[str], int]
"""Where a text can be cut for the tokenizer: see `acdit.codecs.text.Tokenizer.last_cut`."""


@dataclass(frozen=True)
class Piece:
    """Some of a document's text."""

    text: str
    ends: bool
    """Whether the document ends with it."""
    place: Sequence[int]
    """Behind it: where to go on after an interruption; plain numbers, of meaning to the source only."""


class Documents(ABC):
    """A source of documents in a fixed order."""

    where: str
    """For messages."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Plain data that change when the documents may have changed: looked up anew at every call."""

    @abstractmethod
    def pieces(self, cut: Cut, bad: BadFiles, place: Sequence[int] | None = None) -> Iterator[Piece]:
        """The text from a place on (None: from the start). Empty documents are none.

        Args:
            cut: long documents come in pieces that end where this allows.
            bad: counts what cannot be read.

        Raises:
            DataError: more bad files than allowed.
        """

    @abstractmethod
    def between(self, start: Sequence[int] | None, stop: Sequence[int] | None) -> Documents:
        """The same source from one place up to another."""

    def divided(self, held_out: float, part: str, bad: BadFiles) -> Documents:
        """One of two parts that have nothing in common.

        Args:
            held_out: below 1 the share of the documents at the end that is held out (of a single document: of its
                bytes), from 1 on their number; 0: there is no such part, and "train" is everything.
            part: "train" or "held_out".

        Raises:
            ConfigError: another part, or a number that is not whole.
            DataError: nothing would be left to train on, or nothing be held out.
        """
        if part not in PARTS or (held_out == 0 and part != "train"):
            raise ConfigError(
                "data.split", found=f"{part!r}, with data.held_out={held_out:g}",
                expected="train, or held_out with data.held_out above 0",
                fix="set data.held_out to a share like 0.1 or a number of documents",
            )  # fmt: skip
        if held_out == 0:
            return self
        require_whole(held_out)
        boundary = self._boundary(held_out, bad)
        return self.between(None, boundary) if part == "train" else self.between(boundary, None)

    def _boundary(self, held_out: float, bad: BadFiles) -> Sequence[int]:
        """The place where the held-out part begins."""
        if held_out < 1:
            total = sum(piece.ends for piece in self.pieces(len, bad))
            if total == 1:
                return self._inside(held_out)
            held_out = max(1, round(held_out * total))
        ends: deque[Sequence[int]] = deque(maxlen=int(held_out) + 1)
        total = 0
        for piece in self.pieces(len, bad):
            if piece.ends:
                ends.append(piece.place)
                total += 1
        self._require_rest(total, held_out)
        return ends[0]

    def _inside(self, held_out: float) -> Sequence[int]:
        """The place inside the only document."""
        raise DataError(self.where, found="a single document", expected="several, to hold out some")

    def _require_rest(self, total: int, held_out: float) -> None:
        if total <= held_out:
            raise DataError(
                self.where, found=f"{total:,} documents", expected=f"more than the {held_out:,.0f} of data.held_out",
                fix="lower data.held_out",
            )  # fmt: skip


def require_whole(held_out: float) -> None:
    """Refuse a number of documents that is not whole.

    Raises:
        ConfigError: it is not.
    """
    if held_out >= 1 and held_out != int(held_out):
        raise ConfigError("data.held_out", found=f"{held_out:g}", expected="a share below 1, or a whole number")


class BuiltInText(Documents):
    """The packaged cut of tiny Shakespeare (`builtin/README.md`): its last tenth, from a speech on, is held out.

    Args:
        part: "train" or "held_out".

    Raises:
        ConfigError: another part.
    """

    def __init__(self, part: str = "train") -> None:
        if part not in PARTS:
            raise ConfigError("data.split", found=repr(part), expected=f"one of {PARTS} for the built-in text")
        self.where = f"the built-in text, split {part!r}"
        text = (resources.files("acdit.data") / "builtin" / BUILT_IN).read_text(encoding="utf-8")
        boundary = text.rindex("\n\n", 0, int(len(text) * (1 - BUILT_IN_HELD_OUT))) + 2
        self.text = text[:boundary] if part == "train" else text[boundary:]

    def identity(self) -> dict[str, Any]:
        return {"kind": "built-in", "sha256": hashlib.sha256(self.text.encode()).hexdigest()}

    def pieces(self, cut: Cut, bad: BadFiles, place: Sequence[int] | None = None) -> Iterator[Piece]:
        yield Piece(self.text, True, [1])

    def between(self, start: Sequence[int] | None, stop: Sequence[int] | None) -> Documents:
        raise ConfigError("data.held_out", found="a part of the built-in text", expected="0: it has its own two parts")
