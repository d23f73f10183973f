"""Text as sequences of token ids of one length.

All documents, EOS behind each, are one row of tokens, and sequences are its consecutive, disjoint chunks: every token
is in exactly one (but a rest at the end that fills none), so that a perplexity is over the whole split. Documents are
cut at the borders of sequences, and several short ones share one. `data.wrap` says what a sequence of S tokens is:

    joined    S tokens of the row, nothing added
    bos       BOS, then S − 1 tokens
    bos_eos   BOS, S − 2 tokens, EOS (MDLM's and BD3-LMs' protocol)

Whether BOS counts in the bound is the corruption's business (`corruption.first_token_given`). With `data.crop=random` a
sequence begins at any token of its chunk instead of the first: more variety from a small text, at the price that tokens
are no longer seen once an epoch each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from acdit.codecs.text import Tokenizer
from acdit.data.bad_files import BadFiles
from acdit.data.token_cache import Tokens
from acdit.errors import ConfigError, DataError

ADDED = {"joined": 0, "bos": 1, "bos_eos": 2}
"""Tokens that each way to wrap adds to a chunk."""


class Wrap:
    """Chunks of the row of tokens → sequences.

    Args:
        kind: "joined", "bos" or "bos_eos".
        length: S, tokens of a sequence.
        tokenizer: whose BOS and EOS.

    Raises:
        ConfigError: another kind, or no room for a token of the text.
    """

    def __init__(self, kind: str, length: int, tokenizer: Tokenizer) -> None:
        if kind not in ADDED:
            raise ConfigError("data.wrap", found=repr(kind), expected=f"one of {tuple(ADDED)}")
        if length <= ADDED[kind]:
            raise ConfigError(
                "data.sequence_length", found=str(length), expected=f"at least {ADDED[kind] + 1} for {kind}"
            )
        self.kind, self.length, self._tokenizer = kind, length, tokenizer
        self.chunk = length - ADDED[kind]
        """Tokens of the row that a sequence takes."""

    def sequence(self, chunk: np.ndarray) -> Tensor:
        """(chunk,) → int64 (S,).

        Raises:
            DataError: an id outside the vocabulary.
        """
        if chunk.max() >= self._tokenizer.vocab_size:
            raise DataError(
                "tokenised text", found=f"the id {chunk.max()}", expected=f"0 … {self._tokenizer.vocab_size - 1}",
                fix="the file is damaged: remove its folder below data.cache, it is made anew",
            )  # fmt: skip
        row = np.empty(self.length, dtype=np.int64)
        row[: ADDED["bos"]] = self._tokenizer.bos_token_id
        row[-1] = self._tokenizer.eos_token_id
        first = 0 if self.kind == "joined" else 1
        row[first : first + self.chunk] = chunk
        return torch.from_numpy(row)

    @property
    def protocol(self) -> str:
        """For results, beside the figures."""
        content = {
            "joined": f"{self.length} tokens",
            "bos": f"BOS + {self.chunk} tokens",
            "bos_eos": f"BOS + {self.chunk} tokens + EOS",
        }
        return f"documents joined by EOS, disjoint sequences of {content[self.kind]} (wrap {self.kind})"


class TextDataset:
    """Sequences by index.

    Args:
        tokens: the row of ids, or the file it lies in, which is mapped.
        counted: what it holds.
        tokenizer: whose ids they are.
        wrap: how sequences are made.
        bad_files: what was met.
        where: for messages.

    Raises:
        DataError: too little text for one sequence.
    """

    num_classes = 1

    def __init__(
        self, tokens: np.ndarray | Path, counted: Tokens, tokenizer: Tokenizer, wrap: Wrap, bad_files: BadFiles,
        where: str,
    ) -> None:  # fmt: skip
        self._file = tokens if isinstance(tokens, Path) else None
        self._row: Any = None if isinstance(tokens, Path) else tokens
        self.counted, self.tokenizer, self.wrap, self.bad_files = counted, tokenizer, wrap, bad_files
        self.vocab_size = tokenizer.vocab_size
        self.class_names = ["text"]
        self.shape = (wrap.length,)
        """(S,)"""
        self.protocol = wrap.protocol
        if counted.tokens < wrap.chunk:
            bad = [f"{name} ({reason})" for name, reason in bad_files.reasons.items()][:1]
            raise DataError(
                where, found=f"{counted.tokens:,} tokens in {counted.documents:,} documents"
                + "".join(f", {len(bad_files)} bad ones left out, the first {first}" for first in bad),
                expected=f"at least {wrap.chunk:,}, for one sequence",
                fix="lower data.sequence_length (and model.grid), or give more text",
            )  # fmt: skip

    @property
    def row(self) -> np.ndarray:
        """All tokens, one after the other; mapped, not read, where they lie in a file."""
        if self._row is None:
            assert self._file is not None
            itemsize = 2 if self.vocab_size <= 1 << 16 else 4
            self._row = np.memmap(self._file, dtype=f"<u{itemsize}", mode="r")
        return self._row

    def __len__(self) -> int:
        return self.counted.tokens // self.wrap.chunk

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """int64 (S,) and 0."""
        return self.cropped(index, (0.0,))

    def batches(self, size: int, count: int | None = None) -> Iterator[Tensor]:
        """(B, S) int64 of consecutive sequences, up to `size` at a time; of the first `count`, or of all."""
        stop = len(self) if count is None else count
        for start in range(0, stop, size):
            yield torch.stack([self[index][0] for index in range(start, min(start + size, stop))])

    def cropped(self, index: int, place: Sequence[float] | None) -> tuple[Tensor, int]:
        """As `[index]`, from a token of the chunk on that the first draw (in [0, 1)) says."""
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        chunk = self.wrap.chunk
        start = index % len(self) * chunk + int((place or (0.0,))[0] * chunk)
        start = min(start, self.counted.tokens - chunk)
        return self.wrap.sequence(self.row[start : start + chunk]), 0

    def __getstate__(self) -> dict[str, Any]:
        # A mapping does not travel to other processes: it is opened anew.
        return self.__dict__ if self._file is None else {**self.__dict__, "_row": None}
