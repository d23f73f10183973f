"""What is in a data set of text: for people, before they train."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from acdit.data.text import TextDataset
from acdit.data.text_stream import TextStream

_SHOWN = 200  # characters
_COUNTED_AT_ONCE = 1 << 22  # tokens
_MOST_FREQUENT = 10


def describe_text(dataset: TextDataset | TextStream, at_most: int | None = 1000) -> list[tuple[str, str]]:
    """Lines (name, value) for a terminal.

    Args:
        dataset: files or a stream.
        at_most: how many sequences to count tokens in, evenly spaced (the first ones of a stream); None: all (1000 of a
            stream).
    """
    tokenizer, wrap = dataset.tokenizer, dataset.wrap
    lines: list[tuple[str, str]] = []
    if isinstance(dataset, TextDataset):
        counted = dataset.counted
        lines += [
            ("documents", f"{counted.documents:,}"),
            ("characters", f"{counted.characters:,} ({counted.bytes:,} bytes)"),
            ("tokens", f"{counted.tokens:,} ({counted.characters / max(1, counted.tokens):.2f} characters each)"),
            ("sequences", f"{len(dataset):,}"),
            ("left out", f"{counted.tokens - len(dataset) * wrap.chunk:,} tokens at the end"),
        ]
        first, looked_at = dataset.row[: 4 * _SHOWN], min(len(dataset), at_most or len(dataset))
    else:
        looked_at = at_most or 1000
        dataset.start(seed=0, history=0)
        lines.append(("documents", "unknown: a stream"))
        first = np.empty(0)
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    for tokens in _chunks(dataset, looked_at, whole=at_most is None):
        first = first if len(first) else tokens
        counts += np.bincount(tokens, minlength=len(counts))
    common = [int(index) for index in np.argsort(-counts, kind="stable")[:_MOST_FREQUENT] if counts[index]]
    shares = (f"{tokenizer.token(index)!r} {counts[index] / counts.sum():.1%}" for index in common)
    return [
        *lines,
        ("vocabulary", f"{tokenizer.vocab_size:,} tokens, {np.count_nonzero(counts):,} of them seen"),
        ("sample", dataset.protocol),
        ("begins", repr(tokenizer.decode(first[: 4 * _SHOWN].tolist())[:_SHOWN])),
        ("most frequent", ", ".join(shares)),
        ("looked at", f"{looked_at:,} sequences"),
        ("bad files", str(len(dataset.bad_files))),
    ]


def _chunks(dataset: TextDataset | TextStream, looked_at: int, whole: bool) -> Iterator[np.ndarray]:
    if isinstance(dataset, TextStream):
        for position in range(looked_at):
            yield dataset.samples([(position, None)])[0][0].numpy()
    elif whole:
        for start in range(0, dataset.counted.tokens, _COUNTED_AT_ONCE):
            yield dataset.row[start : start + _COUNTED_AT_ONCE].astype(np.int64)
    else:
        chunk = dataset.wrap.chunk
        for index in np.linspace(0, len(dataset) - 1, looked_at).round().astype(np.int64):
            yield dataset.row[index * chunk : (index + 1) * chunk].astype(np.int64)
